"""A task named on the command line: a folder, a packed file, or one that comes with Kiridashi."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kiridashi_server.tasks import Samples, Task

TASK_HELP = "a folder of class folders, a packed file, or a shipped task's name"


def read_task(name: str, image_size: int, seed: int) -> Task:
    """Load the task; what exists as a folder or file wins over a shipped name.

    Raises:
        TaskError: nothing of that name, or it cannot be used.
    """
    from kiridashi_server.tasks import load_packed, load_shipped, load_task

    path = Path(name)
    if path.is_dir():
        return load_task(path, image_size, seed)
    if path.is_file():
        return load_packed(path)
    return load_shipped(name, image_size, seed)


def few_samples(task: Task, per_class: int, seed: int) -> Samples:
    """The training samples, or with ``per_class`` above zero so many of each class."""
    train = task.split("train")
    return train.few_shot(per_class, seed) if per_class else train
