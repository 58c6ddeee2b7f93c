"""Stock: cuts of the backbone at a few sizes, recovered once on the bank's tasks, that new lines are cut from."""
