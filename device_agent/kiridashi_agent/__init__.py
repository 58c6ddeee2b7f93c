"""The device agent: fetches, checks, measures, tunes and activates a line's model, and says what is true."""
