"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done and the total."""


def no_progress(done: int, total: int) -> None:
    """For callers that do not want to be told."""
