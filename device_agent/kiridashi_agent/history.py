"""What was measured on this device before: one line of JSON for each file, the newest last, bounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.budget import Measurement
from kiridashi.errors import StateError

NAME = "measurements.jsonl"
MAX_ENTRIES = 300


class Entry(msgspec.Struct, frozen=True):
    """A file's measurement. ``at`` is the device's clock in UTC, ``file`` the name without its folder."""

    at: str
    file: str
    sha256: str
    agent_version: str
    measured: Measurement


def read_history(folder: Path) -> tuple[Entry, ...]:
    """The entries in a state folder, oldest first; a line that cannot be read is passed over.

    Raises:
        StateError: the file cannot be read.
    """
    path = folder / NAME
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise StateError(f"the history {path} cannot be read", why=str(error)) from error
    entries = []
    for line in lines:
        try:
            entries.append(msgspec.json.decode(line, type=Entry))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # of another version; the others are still worth having
    return tuple(entries)


def add_to_history(folder: Path, new: Sequence[Entry]) -> None:
    """Keep entries, and of all of them the newest :data:`MAX_ENTRIES`.

    Raises:
        StateError: there is no such folder, or the file cannot be written.
    """
    if not folder.is_dir():
        raise StateError(
            f"the history is not kept: there is no state folder {folder}", next_step="name one: --state DIR"
        )
    kept = (*read_history(folder), *new)[-MAX_ENTRIES:]
    try:
        write_atomic(folder / NAME, b"".join(msgspec.json.encode(entry) + b"\n" for entry in kept))
    except OSError as error:
        raise StateError(f"the history is not kept in {folder}", why=str(error)) from error


def last_like(history: Sequence[Entry], sha256: str, measured: Measurement) -> Entry | None:
    """The newest entry of the same file, measured in the same way. Pure."""

    def way(one: Measurement) -> tuple[object, ...]:
        return one.runtime, one.provider, one.threads, one.timed, one.hardware

    alike = (entry for entry in history if entry.sha256 == sha256 and way(entry.measured) == way(measured))
    return next(reversed(list(alike)), None)
