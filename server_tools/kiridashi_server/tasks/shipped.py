"""The tasks that come with Kiridashi: pictograms in three drawing styles.

Server splits (train, val) use two styles; the device's splits (tune, holdout, test) a third that the server never
sees. Sources and licences of the drawings: ``data/NOTICE.md``.
"""

from __future__ import annotations

from importlib.resources import files

from kiridashi_server.tasks.drawings import DEFAULT_VIEWS, Pack, Views, open_pack, render_task
from kiridashi_server.tasks.task import Task

PACK = "shipped.zip"


def shipped_names() -> tuple[str, ...]:
    """Names of the shipped tasks, in the pack's order.

    Raises:
        TaskError: the pack is missing or damaged.
    """
    return shipped_pack().names


def load_shipped(name: str, image_size: int = 64, seed: int = 0, views: Views = DEFAULT_VIEWS) -> Task:
    """Render a shipped task, one of :func:`shipped_names`; see :func:`kiridashi_server.tasks.drawings.render_task`.

    Raises:
        TaskError: no such task, or the pack is missing or damaged.
    """
    return render_task(shipped_pack(), name, image_size, seed, views)


def shipped_pack() -> Pack:
    """The pack of the shipped tasks.

    Raises:
        TaskError: it is missing or damaged.
    """
    folder = files("kiridashi_server.tasks") / "data"
    return open_pack(folder, PACK, next_step="install kiridashi again, or run scripts/build_tasks.py")
