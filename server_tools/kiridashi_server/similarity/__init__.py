"""How much a past task's record has to say about a new task."""
