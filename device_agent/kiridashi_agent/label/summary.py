"""How far the naming of a line's frames has come, in numbers."""

from __future__ import annotations

from collections import Counter

import msgspec
from kiridashi.spool import AnswerLog, SpoolFolder


class NamedFrames(msgspec.Struct, frozen=True):
    """Kept frames: ``named`` by class, ``unsure``, ``none`` of the classes, ``waiting``, and unreadable ones."""

    named: dict[str, int] = {}
    unsure: int = 0
    none: int = 0
    waiting: int = 0
    damaged: int = 0

    def __str__(self) -> str:
        classes = ", ".join(f"{label} {count}" for label, count in self.named.items()) or "none yet"
        aside = f"; {self.damaged} unreadable, set aside" if self.damaged else ""
        return f"{self.waiting} waiting to be named; named: {classes}{aside}"


def named_frames(folder: SpoolFolder) -> NamedFrames:
    """Count what a spool holds.

    Raises:
        StateError: the answers cannot be read.
    """
    kept = {place.name for place in folder.scan(folder.answered)}
    answers = [answer for answer in AnswerLog(folder.answers_path).answers() if answer.entry in kept]
    kinds = Counter(answer.kind for answer in answers)
    classes = Counter(answer.label for answer in answers if answer.kind == "class")
    return NamedFrames(
        named=dict(sorted(classes.items())),
        unsure=kinds["unsure"],
        none=kinds["none"],
        waiting=len(folder.scan(folder.frames)) + len(kept) - len(answers),
        damaged=folder.damaged(),
    )
