"""Locks between the processes of one device, as files beside the journal. The kernel frees them when a process ends."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from kiridashi.artifacts import open_lock
from kiridashi.errors import StateError
from kiridashi.messages import check_name

FIRST_S = 15.0
"""How long a command waits for a tuning to make way. Its child is killed at once; the rest is clearing up."""
ASK_EVERY_S = 0.25
"""How often a tuning looks whether somebody wants its line."""
_POLL_S = 0.05


@contextmanager
def locked(folder: Path, name: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock ``name`` (a line's, or another word).

    Raises:
        StateError: it is taken, and ``wait`` is false.
    """
    with _opened(folder, f"{check_name(name, 'lock')}.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(folder, name) from error
        yield


@contextmanager
def locked_first(folder: Path, line: str) -> Iterator[None]:
    """Hold a line's lock for what a person wants now: a tuning of the line makes way (:class:`MakesWay`).

    Raises:
        StateError: it did not come free within :data:`FIRST_S`.
    """
    deadline = time.monotonic() + FIRST_S
    with _opened(folder, _first(line)) as first, _opened(folder, f"{line}.lock") as file:
        for one in (first, file):
            while not _taken(one):
                if time.monotonic() > deadline:
                    raise _busy(folder, line, f", and did not let go of it within {FIRST_S:g} s")
                time.sleep(_POLL_S)
        yield


def is_wanted(folder: Path, line: str) -> bool:
    """Whether somebody waits with :func:`locked_first` for a line's lock, or has it."""
    with suppress(FileNotFoundError), (folder / _first(line)).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class MakesWay(threading.Event):
    """Is set when another event is, or when ``wanted`` says so, which is asked a few times a second."""

    def __init__(self, other: threading.Event | None, wanted: Callable[[], bool]) -> None:
        super().__init__()
        self._other, self._wanted = other, wanted
        self._ask_at = 0.0

    def is_set(self) -> bool:
        """Whether it is time to end."""
        if self._other is not None and self._other.is_set():
            return True
        if not super().is_set() and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + ASK_EVERY_S
            if self._wanted():
                self.set()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """See :meth:`threading.Event.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (deadline is None or time.monotonic() < deadline):
            time.sleep(_POLL_S)
        return self.is_set()


def _first(line: str) -> str:
    return f"{check_name(line, 'line')}.first.lock"


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[IO[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_lock(folder / name), "w") as file:
        yield file


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _busy(folder: Path, name: str, more: str = "") -> StateError:
    return StateError(
        f"'{name}' in {folder.parent} is in use by another process",
        why=f"an agent runs there, or works on that line{more}",
        next_step="wait for it, or stop it (systemctl stop kiridashi-agent), then try again",
    )
