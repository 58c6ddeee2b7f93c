"""Settings of the recovery, settled by tasks of the bank that play new."""
