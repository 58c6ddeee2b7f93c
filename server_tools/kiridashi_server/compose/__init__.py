"""From evidence to scores for a new task, and from scores to the units that stay."""
