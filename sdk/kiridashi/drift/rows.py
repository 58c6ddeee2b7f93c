"""Rows of statistics as files: what line processes leave for the watch, and the reference in a bundle. No numpy.

``<state>/spool/<line>/statistics/`` has small files of some rows each. Each appears whole by a rename, any number of
processes write, and the oldest leave when there are too many. Rows hold no picture, and nothing of them is sent.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from kiridashi.artifacts import write_atomic
from kiridashi.errors import BundleError, StateError
from kiridashi.messages import check_name

FOLDER_NAME = "statistics"
REFERENCE_NAME = "drift-reference.json"
REFERENCE_FORMAT = "kiridashi-drift-reference/1"
MAX_REFERENCE_ROWS = 256
MAX_REFERENCE_BYTES = 256 * 1024
MAX_FILES = 256
MAX_BYTES = 256 * 1024
_SUFFIX = ".rows"
_DIGITS = 6
_log = logging.getLogger(__name__)


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One frame: when by the device's clock, its best class, and its statistics in the order of ``NAMES``."""

    at_s: float
    best: int
    values: tuple[float, ...]


class RowFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of one model, in the order of time; ``names`` says what their numbers are."""

    digest: str
    names: tuple[str, ...]
    rows: tuple[Row, ...]


class DriftReference(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle's reference: rows of server samples that are independent of each other, by the float model."""

    format: str = REFERENCE_FORMAT
    names: tuple[str, ...]
    rows: tuple[Row, ...]


def shortened(row: Row) -> Row:
    """The row with six digits, which is how it is stored."""
    return Row(row.at_s, row.best, tuple(float(f"{value:.{_DIGITS}g}") for value in row.values))


def decode_reference(data: bytes, source: str) -> DriftReference:
    """Read a bundle's reference.

    Raises:
        BundleError: it is not one, or its rows do not fit its names.
    """
    try:
        reference = msgspec.json.decode(data, type=DriftReference)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{source} is not a drift reference", why=str(error)) from error
    if reference.format != REFERENCE_FORMAT or len(reference.rows) > MAX_REFERENCE_ROWS:
        raise BundleError(f"{source} has the format '{reference.format}' and {len(reference.rows)} rows")
    if not all(_is_sound(row, len(reference.names)) for row in reference.rows):
        raise BundleError(f"{source} has rows that do not fit its names")
    return reference


class RowFolder:
    """The files of rows of one line. It holds no state, so every process may have one.

    Raises:
        InputError: the line's name is not a safe name.
    """

    def __init__(self, state_dir: Path, line: str) -> None:
        self.line = check_name(line, "line")
        self.path = state_dir / "spool" / line / FOLDER_NAME

    def add(self, file: RowFile) -> None:
        """Write a file of rows and let the oldest of too many go. Not synced. Raises OSError."""
        for folder in (self.path.parent.parent, self.path.parent, self.path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"
        part = self.path / f".{name}"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(msgspec.json.encode(file))
            part.replace(self.path / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        for old in self.names()[:-MAX_FILES]:
            (self.path / old).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The files that are there, oldest first; a folder, a link or a pipe is none."""
        try:
            with os.scandir(self.path) as items:
                return sorted(i.name for i in items if i.name.endswith(_SUFFIX) and i.is_file(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> RowFile | None:
        """One file; ``None`` if it has left, or cannot be read: that is logged."""
        try:
            with (self.path / name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            rows = msgspec.json.decode(data, type=RowFile)
            if not all(_is_sound(row, len(rows.names)) for row in rows.rows):
                raise StateError("its rows do not fit its names")
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, StateError) as error:
            _log.warning("line=%s the statistics in %s are left out: %s", self.line, self.path / name, error)
            return None
        return rows

    def remove(self, names: Collection[str]) -> None:
        """Delete files; also what writers that died have left. Raises OSError."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        for part in self.path.glob(f".*{_SUFFIX}"):
            if abs(time.time() - part.stat().st_mtime) > 60.0:
                part.unlink(missing_ok=True)


def write_reference(path: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a bundle's reference: the same rows, the same bytes."""
    reference = DriftReference(names=tuple(names), rows=tuple(shortened(row) for row in rows))
    write_atomic(path, msgspec.json.encode(reference, order="sorted"))


def _is_sound(row: Row, numbers: int) -> bool:
    return len(row.values) == numbers and row.best >= 0 and all(map(math.isfinite, row.values))
