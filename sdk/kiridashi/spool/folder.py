"""The spool's folder: what is in it, adding and taking away so that it never grows over its limits."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from kiridashi.artifacts import is_shortage, sync_folder
from kiridashi.errors import StateError
from kiridashi.messages import check_name
from kiridashi.spool.entries import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    Frame,
    FrameHeader,
    Place,
    decode_frame,
    decode_header,
    parse_name,
)

MAX_ASIDE = 16
MAX_UNFINISHED = 8
UNFINISHED_AFTER_S = 60.0
_PART = ".part"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class SpoolFolder:
    """The files of one line's spool. It holds no state, so every process may have one.

    Raises:
        InputError: the line's name is not a safe name.
    """

    def __init__(self, state_dir: Path, line: str) -> None:
        self.line = check_name(line, "line")
        self.root = state_dir / "spool" / line
        self.frames = self.root / "frames"
        self.answered = self.root / "answered"
        self.aside = self.root / "aside"

    @property
    def answers_path(self) -> Path:
        """The file of what people said."""
        return self.root / "answers.jsonl"

    def prepare(self) -> None:
        """Make the folders, closed to other accounts. Raises OSError."""
        for folder in (self.root.parent, self.root, self.frames, self.answered, self.aside):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def scan(self, folder: Path) -> list[Place]:
        """The frames in ``frames`` or ``answered``, lowest rank first.

        What a crash left unfinished is removed, and files that are no frames are set aside.
        """
        places, unfinished, foreign = [], [], []
        try:
            with os.scandir(folder) as items:
                for item in items:
                    try:
                        status = item.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # another process has just taken it away
                    place = parse_name(item.name, status.st_size)
                    if item.name.endswith(_PART):
                        unfinished.append((status.st_mtime, Path(item.path)))
                    elif place is not None and item.is_file(follow_symlinks=False):
                        places.append(place)
                    else:
                        foreign.append(Path(item.path))
        except FileNotFoundError:
            return []
        _remove_unfinished(unfinished)
        for path in foreign:
            self.set_aside(path, "it is not a kept frame")
        return sorted(places, key=lambda place: place.rank)

    def add(self, name: str, data: bytes) -> None:
        """Write an encoded frame into ``frames``: it appears whole or not at all. Raises OSError.

        Not synced: a frame that a power cut tears is found by its check sum, and waiting for the disk would wear it.
        """
        part = self.frames / f".{name}{_PART}"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            part.replace(self.frames / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def claim(self, place: Place) -> bool:
        """Move a frame to ``answered``, durably; false if it has left meanwhile. Raises OSError."""
        target = self.answered / place.name
        try:
            (self.frames / place.name).rename(target)
        except FileNotFoundError:
            return False
        with target.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(self.answered)
        return True

    def header(self, path: Path) -> FrameHeader | None:
        """The header of a frame; ``None`` if it has left, cannot be read now, or was damaged and is now set aside."""
        return self._decoded(path, MAX_HEADER_BYTES + 8, lambda data, source: decode_header(data, source)[0])

    def read(self, path: Path) -> Frame | None:
        """A whole frame, checked; ``None`` as :meth:`header`."""
        return self._decoded(path, MAX_FILE_BYTES + 1, decode_frame)

    def damaged(self) -> int:
        """How many unreadable files are kept aside."""
        return sum(1 for _ in self.aside.iterdir()) if self.aside.is_dir() else 0

    def set_aside(self, path: Path, why: str) -> None:
        """Move a file out of the way, say so in the log, and keep the newest of such files only."""
        _log.warning("line=%s %s was set aside: %s", self.line, path, why)
        try:
            self.aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.rename(self.aside / path.name.removeprefix("."))
            files = [(item.lstat().st_mtime, item) for item in self.aside.iterdir() if not item.is_dir()]
            for _, item in sorted(files)[:-MAX_ASIDE]:
                item.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("line=%s %s cannot be moved: %s", self.line, path, error)

    def _decoded(self, path: Path, limit: int, decode: Callable[[bytes, str], _T]) -> _T | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(limit)
            return decode(data, str(path))
        except FileNotFoundError:
            return None
        except (OSError, StateError) as error:
            if isinstance(error, OSError) and is_shortage(error):
                _log.warning("line=%s %s cannot be read now: %s", self.line, path, error)
            else:
                self.set_aside(path, str(error))
            return None


def remove(folder: Path, places: Iterable[Place]) -> None:
    """Delete frames; one that another process has deleted is no concern. Raises OSError."""
    for place in places:
        (folder / place.name).unlink(missing_ok=True)


def _remove_unfinished(parts: list[tuple[float, Path]]) -> None:
    """Writing takes milliseconds: what is a minute old, or one of too many, was left by a process that died."""
    now = time.time()
    newest_first = sorted(parts, reverse=True)
    for number, (written_s, path) in enumerate(newest_first):
        if number >= MAX_UNFINISHED or abs(now - written_s) > UNFINISHED_AFTER_S:
            path.unlink(missing_ok=True)
