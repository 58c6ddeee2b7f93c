"""What to show next, what an answer does, and how far the naming has come. No HTTP, no clock.

A frame is claimed when it is shown: it moves to the spool's ``answered`` folder, where the line cannot displace it
while somebody looks at it. A claimed frame without an answer is shown again first.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from kiridashi.errors import InputError, StateError
from kiridashi.spool import Answer, AnswerLog, Frame, FrameHeader, Place, SpoolFolder
from kiridashi.spool.answers import AnswerKind
from kiridashi.spool.entries import parse_name
from kiridashi.spool.folder import remove

GUESSES = 3
RANDOM_TURN = 4
NEED_WEIGHT = 0.5


@dataclass(frozen=True)
class LabelGoal:
    """The classes, how many frames of each are wanted, and how many answered frames are kept."""

    labels: tuple[str, ...]
    model_digest: str
    per_class: int = 20
    max_frames: int = 1024
    max_bytes: int = 128 * 1024 * 1024


@dataclass(frozen=True)
class ClassChoice:
    """A class as it can be answered: ``value`` is what the model gives it, ``missing`` the frames still wanted."""

    label: str
    value: float
    missing: int


@dataclass(frozen=True)
class View:
    """What the page shows.

    Attributes:
        entry: the frame's name; empty when none is waiting.
        guesses: the classes that the model thinks of first, the likeliest first.
        others: all other classes, in the model's order.
        named: wanted frames that are named, and ``wanted`` all of them.
        waiting: frames that nobody has answered yet, the one shown included.
        last: the answer that an undo would take back.
        damaged: unreadable files that were set aside.
    """

    entry: str
    height: int
    width: int
    guesses: tuple[ClassChoice, ...]
    others: tuple[ClassChoice, ...]
    named: int
    wanted: int
    waiting: int
    last: Answer | None
    damaged: int


class LabelSession:
    """The naming of one line's frames. Not thread-safe: the server holds a lock around every call."""

    def __init__(self, folder: SpoolFolder, goal: LabelGoal) -> None:
        self._folder, self._goal = folder, goal
        self._log = AnswerLog(folder.answers_path)
        self._again: list[str] = []
        self._headers: dict[str, FrameHeader] = {}
        folder.prepare()

    def aim_at(self, goal: LabelGoal) -> None:
        """Go on with other classes, those of a model that became active meanwhile."""
        self._goal = goal

    def view(self) -> View:
        """What to show now; claims the frame.

        Raises:
            StateError: the answers cannot be read.
            OSError: the folder cannot be read or written.
        """
        answers, places = self._current()
        missing = self._missing(answers)
        place, header = self._next(answers, places, missing)
        choices = self._choices(header, missing)
        guesses = sorted((c for c in choices if c.value > 0), key=lambda c: -c.value)[:GUESSES]
        wanted = self._goal.per_class * len(self._goal.labels)
        answered = {answer.entry for answer in answers}
        claimed = sum(1 for kept in self._folder.scan(self._folder.answered) if kept.name not in answered)
        return View(
            entry=place.name if place else "",
            height=header.height if header else 0,
            width=header.width if header else 0,
            guesses=tuple(guesses),
            others=tuple(choice for choice in choices if choice not in guesses),
            named=wanted - sum(missing.values()),
            wanted=wanted,
            waiting=claimed + len(self._folder.scan(self._folder.frames)),
            last=answers[-1] if answers else None,
            damaged=self._folder.damaged(),
        )

    def answer(self, entry: str, kind: AnswerKind, label: str, by: str, at_s: float) -> None:
        """Keep what somebody said of a frame that was shown.

        Raises:
            InputError: no such class.
            StateError: the frame is gone, or the answer cannot be written.
        """
        if (kind == "class") != (label in self._goal.labels) or (kind != "class" and label):
            raise InputError(f"'{label}' is not a class of line '{self._folder.line}'")
        if parse_name(entry, 0) is None or not (self._folder.answered / entry).is_file():
            raise StateError("this frame is no longer there", next_step="name the next one")
        self._log.add(Answer(secrets.token_hex(8), entry, kind, at_s, label, by))
        self._again = [name for name in self._again if name != entry]

    def undo(self, answer_id: str, by: str, at_s: float) -> None:
        """Take an answer back and show its frame again; nothing happens if it was taken back already.

        Raises:
            StateError: it cannot be written.
        """
        for answer in self._log.answers():
            if answer.id == answer_id:
                self._log.undo(answer_id, at_s, by)
                self._again.append(answer.entry)

    def frame(self, entry: str) -> Frame | None:
        """The pixels of a frame that was shown."""
        return self._folder.read(self._folder.answered / entry) if parse_name(entry, 0) else None

    def people(self) -> list[str]:
        """The initials that were used, the latest first."""
        return list(dict.fromkeys(answer.by for answer in reversed(self._log.answers()) if answer.by))

    def _current(self) -> tuple[list[Answer], list[Place]]:
        """The answers whose frames are still kept, and the kept frames."""
        places = self._folder.scan(self._folder.answered)
        names = {place.name for place in places}
        return [answer for answer in self._log.answers() if answer.entry in names], places

    def _missing(self, answers: Iterable[Answer]) -> dict[str, int]:
        counts = Counter(answer.label for answer in answers if answer.kind == "class")
        return {label: max(0, self._goal.per_class - counts[label]) for label in self._goal.labels}

    def _next(
        self, answers: list[Answer], places: list[Place], missing: dict[str, int]
    ) -> tuple[Place | None, FrameHeader | None]:
        """The frame to show, claimed and known to be whole."""
        done = {answer.entry for answer in answers}
        claimed = [place for place in places if place.name not in done]
        claimed.sort(key=lambda p: self._again.index(p.name) if p.name in self._again else -1)
        while claimed:
            place = claimed.pop()
            frame = self._folder.read(self._folder.answered / place.name)
            if frame is not None:
                return place, frame.header
        waiting = self._folder.scan(self._folder.frames)
        present = {place.name for place in waiting}
        self._headers = {name: header for name, header in self._headers.items() if name in present}
        while waiting:
            place = self._most_useful(waiting, missing, is_random_turn=len(answers) % RANDOM_TURN == RANDOM_TURN - 1)
            waiting.remove(place)
            frame = self._folder.read(self._folder.frames / place.name)
            if frame is None:
                continue
            remove(self._folder.answered, to_forget(places, answers, place.bytes, self._goal))
            if self._folder.claim(place):
                return place, frame.header
        return None, None

    def _most_useful(self, waiting: Sequence[Place], missing: dict[str, int], *, is_random_turn: bool) -> Place:
        """The random draw is shown in its own order, whatever is in it: chosen among, it would be random no more."""
        drawn = [place for place in waiting if place.kind == "random"]
        uncertain = [place for place in waiting if place.kind == "uncertain"]
        if drawn and (is_random_turn or not uncertain):
            return drawn[-1]
        return max(uncertain, key=partial(self._usefulness, missing=missing))

    def _usefulness(self, place: Place, missing: dict[str, int]) -> float:
        """How little sure the model was, and whether the class it thinks of is still wanted."""
        header = self._headers.get(place.name) or self._folder.header(self._folder.frames / place.name)
        if header is None:
            return -1.0
        self._headers[place.name] = header
        best = max(self._choices(header, missing), key=lambda choice: choice.value)
        return 1.0 - header.margin + NEED_WEIGHT * best.missing / self._goal.per_class

    def _choices(self, header: FrameHeader | None, missing: dict[str, int]) -> list[ClassChoice]:
        """Every class with the model's value, 0 where the frame does not tell."""
        values: dict[str, float] = {}
        if header is not None:
            same_model = header.digest == self._goal.model_digest and len(header.values) == len(self._goal.labels)
            names = header.labels or (self._goal.labels if same_model else ())
            values = dict(zip(names, header.values, strict=False))
        return [ClassChoice(label, values.get(label, 0.0), missing[label]) for label in self._goal.labels]


def to_forget(places: Sequence[Place], answers: Sequence[Answer], size: int, goal: LabelGoal) -> list[Place]:
    """Which answered frames leave for one more: those without a class first, then the oldest of the largest class."""
    kept = {place.name: place for place in places}
    counts = Counter(answer.label for answer in answers if answer.kind == "class")
    waiting = [answer for answer in answers if answer.entry in kept]
    total, leaving = sum(place.bytes for place in places) + size, []
    while waiting and (len(kept) + 1 > goal.max_frames or total > goal.max_bytes):
        answer = min(waiting, key=lambda a: (a.kind == "class", -counts[a.label], a.at_s))
        waiting.remove(answer)
        counts[answer.label] -= 1
        place = kept.pop(answer.entry)
        total -= place.bytes
        leaving.append(place)
    return leaving
