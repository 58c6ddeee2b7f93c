"""The error of everything that concerns tasks."""

from kiridashi.errors import InputError


class TaskError(InputError):
    """A task's folder, packed file or samples cannot be used; the message names the file or class."""
