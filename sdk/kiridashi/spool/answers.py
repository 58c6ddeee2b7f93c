"""What people said of frames: an append-only file of JSON lines, synced line by line.

A line that a crash tore is skipped, and the next one begins on a line of its own. Above ``MAX_LOG_BYTES`` the file is
replaced by the answers that still hold.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from kiridashi.artifacts import write_atomic
from kiridashi.errors import StateError

AnswerKind = Literal["class", "none", "unsure"]
MAX_LOG_BYTES = 4 * 1024 * 1024
MAX_LINE_BYTES = 4096


class Answer(msgspec.Struct, frozen=True, tag="answer", tag_field="do"):
    """``entry`` is the frame's file name, ``label`` the class with ``kind`` "class", ``by`` initials or nothing."""

    id: str
    entry: str
    kind: AnswerKind
    at_s: float
    label: str = ""
    by: str = ""


class Undo(msgspec.Struct, frozen=True, tag="undo", tag_field="do"):
    """Takes the answer ``id`` back."""

    id: str
    at_s: float
    by: str = ""


class AnswerLog:
    """The file ``answers.jsonl`` of one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answers(self) -> list[Answer]:
        """The answers that hold, oldest first: not taken back, and the last one for each frame.

        Raises:
            StateError: the file cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StateError(f"the answers in {self.path} cannot be read", why=str(error)) from error
        return _holding(data)

    def add(self, answer: Answer) -> None:
        """Make an answer durable.

        Raises:
            StateError: it cannot be written; the file is as before.
        """
        self._append(answer)

    def undo(self, answer_id: str, at_s: float, by: str = "") -> None:
        """Take an answer back. Raises as :meth:`add`."""
        self._append(Undo(answer_id, at_s, by))

    def _append(self, record: Answer | Undo) -> None:
        line = msgspec.json.encode(record) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise StateError("the answer is too long to be kept", why=f"it has {len(line)} bytes")
        try:
            with self._locked() as descriptor:
                self._write(descriptor, line)
        except OSError as error:
            step = "make room on the disk, then answer again"
            raise StateError(f"the answer cannot be kept in {self.path}", why=str(error), next_step=step) from error

    def _write(self, descriptor: int, line: bytes) -> None:
        size = os.fstat(descriptor).st_size
        if size > MAX_LOG_BYTES:
            kept = b"".join(msgspec.json.encode(answer) + b"\n" for answer in self.answers())
            write_atomic(self.path, kept + line, mode=0o600)
            return
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError("only a part of the line was written")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, held against other writers; the kernel lets go of it when a process dies."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                    yield descriptor
                    return
            finally:
                os.close(descriptor)


def _holding(data: bytes) -> list[Answer]:
    records: dict[str, Answer] = {}
    for line in data.splitlines():
        try:
            record = msgspec.json.decode(line, type=Answer | Undo)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # torn by a crash: the answer was never confirmed to anybody
        if isinstance(record, Answer):
            records[record.id] = record
        else:
            records.pop(record.id, None)
    last = {answer.entry: answer.id for answer in records.values()}
    return [answer for answer in records.values() if last[answer.entry] == answer.id]
