"""The tasks of the benchmark of reuse: many small tasks whose classes and drawings have nothing in common.

Every task has a role. ``bank`` tasks are the past, ``held-out`` tasks are the new lines that numbers are reported on,
``development`` tasks are there to choose anything by hand. The partition is part of the pack (``data/oneshot.zip``) and
was drawn once, from a seed; so is the order within a role: the first n bank tasks are a bank of n drawn at random.

A class is one drawing in four styles: ``train`` shows it in two of them, ``val`` in a third, ``test`` in a fourth that
nobody has seen. There are no splits ``tune`` and ``holdout``. Sources and licences: ``data/NOTICE.md``.
``scripts/build_tasks.py scripts/oneshot_tasks.toml`` rebuilds the pack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from kiridashi_server.tasks import Task, Views
from kiridashi_server.tasks.drawings import Pack, open_pack, render_task

Role: TypeAlias = Literal["bank", "held-out", "development"]
Kinship: TypeAlias = Literal["pool", "area", "none"]

DATA, PACK = Path(__file__).parent / "data", "oneshot.zip"
VIEWS = Views(train=4, val=8, test_per_class=24)
"""Of a class: 8 training samples (4 in each of 2 styles), 8 for validation, 24 for the test."""


def read_pack(folder: Path = DATA) -> Pack:
    """Open the pack, after its SHA-256 was verified.

    Raises:
        TaskError: it is missing or damaged.
    """
    return open_pack(folder, PACK, next_step="run scripts/build_tasks.py scripts/oneshot_tasks.toml")


def task_names(role: Role) -> tuple[str, ...]:
    """Names of the tasks of a role, in the order of the draw.

    Raises:
        TaskError: the pack is missing or damaged.
    """
    return tuple(task.name for task in read_pack().recipe.tasks if task.role == role)


def load_task(name: str, image_size: int = 64, seed: int = 0, views: Views = VIEWS) -> Task:
    """Render a task; see :func:`kiridashi_server.tasks.drawings.render_task`.

    Raises:
        TaskError: no such task, or the pack is missing or damaged.
    """
    return render_task(read_pack(), name, image_size, seed, views)


def kinship(name: str) -> Kinship:
    """How near the bank comes to a task: a bank task from the same pool, from the same area only, or neither.

    Raises:
        TaskError: no such task, or the pack is missing or damaged.
    """
    pack = read_pack()
    task, bank = pack.task(name), [task for task in pack.recipe.tasks if task.role == "bank"]
    if task.pool in {other.pool for other in bank}:
        return "pool"
    return "area" if task.area in {other.area for other in bank} else "none"
