"""What a task is: labelled images in named splits, each image with the source it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.seeding import generator_for

SplitName: TypeAlias = Literal["train", "val", "tune", "holdout", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
"""``train`` and ``val`` belong to the server; ``tune``, ``holdout`` and ``test`` to the device."""

TRAINING_SPLITS: tuple[SplitName, ...] = ("train", "tune")
"""Splits that something is fitted on: each must show every class."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled images.

    Attributes:
        images: uint8 [N, H, W, 3], RGB.
        labels: int64 [N], an index into the task's labels.
        sources: N names of what each image shows one view of (a drawing, a part, a photograph). Views of one
            source are not independent: confidence intervals are clustered by it, and splits never share it.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise TaskError(
                "samples need images of dtype uint8 and shape [N, H, W, 3]",
                why=f"got {self.images.dtype} {list(self.images.shape)}",
            )
        if self.labels.dtype != np.int64 or self.labels.shape != (len(self.images),):
            raise TaskError(
                f"samples need {len(self.images)} labels of dtype int64",
                why=f"got {self.labels.dtype} {list(self.labels.shape)}",
            )
        if len(self.sources) != len(self.images):
            raise TaskError(f"samples need {len(self.images)} sources", why=f"got {len(self.sources)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def clusters(self) -> NDArray[np.int64]:
        """The sources as numbers, int64 [N]: equal where the source is equal."""
        return np.unique(np.asarray(self.sources, dtype=object), return_inverse=True)[1].astype(np.int64)

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` over images, labels and sources."""
        whole = hashlib.sha256()
        self._update_digest(whole)
        return f"sha256:{whole.hexdigest()}"

    def _update_digest(self, whole: hashlib._Hash) -> None:
        _update(whole, repr(self.images.shape).encode())
        _update(whole, np.ascontiguousarray(self.images).tobytes())
        _update(whole, self.labels.astype("<i8").tobytes())
        for source in self.sources:
            _update(whole, source.encode())

    def take(self, indices: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order."""
        return Samples(self.images[indices], self.labels[indices], tuple(self.sources[i] for i in indices))

    def few_shot(self, per_class: int, seed: int) -> Samples:
        """Choose ``per_class`` samples of every class that occurs, spread over as many sources as there are.

        A source gives its second sample only after every other source of the class has given its first.

        Raises:
            TaskError: ``per_class`` is below 1, or a class has fewer samples.
        """
        if per_class < 1:
            raise TaskError("few_shot needs at least one sample per class", why=f"got {per_class}")
        chosen = [self._spread(int(label), per_class, seed) for label in np.unique(self.labels)]
        return self.take(np.concatenate(chosen)) if chosen else self

    def _spread(self, label: int, count: int, seed: int) -> NDArray[np.int64]:
        members = np.flatnonzero(self.labels == label)
        if len(members) < count:
            raise TaskError(
                f"few_shot cannot choose {count} samples of class number {label}",
                why=f"it has only {len(members)}",
                next_step="ask for fewer samples per class",
            )
        shuffled = generator_for(seed, "few-shot", label).permutation(members)
        earlier: dict[str, int] = {}
        rounds = []
        for index in shuffled:
            source = self.sources[index]
            rounds.append(earlier.get(source, 0))
            earlier[source] = rounds[-1] + 1
        return shuffled[np.argsort(rounds, kind="stable")[:count]]


@dataclass(frozen=True, eq=False)
class Task:
    """A classification task.

    Attributes:
        name: what the task is called in the bank and in reports.
        labels: class names; a label number is an index into them.
        splits: samples by split name; all images have one size.

    Raises:
        TaskError: fewer than two classes, a class without samples (in the whole task, or in a split that is
            trained on), an unknown split, a label out of range, mixed sizes, or one source in two splits.
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[SplitName, Samples]

    def __post_init__(self) -> None:
        check_classes(self.name, self.labels)
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            raise TaskError(f"task '{self.name}' has an unknown split '{unknown[0]}'", why=f"known: {SPLITS}")
        object.__setattr__(self, "splits", {name: self.splits[name] for name in SPLITS if name in self.splits})
        self._check_labels()
        self._check_sources()
        if len({samples.images.shape[1:] for samples in self.splits.values()}) > 1:
            raise TaskError(f"task '{self.name}' has images of different sizes")

    def split(self, name: SplitName) -> Samples:
        """The samples of a split.

        Raises:
            TaskError: the task does not have it.
        """
        if name not in self.splits:
            raise TaskError(
                f"task '{self.name}' has no split '{name}'",
                why=f"it has: {', '.join(self.splits) or 'none'}",
                next_step=f"add a file {name}.txt that lists its images",
            )
        return self.splits[name]

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` over name, labels, and every split's images, labels and sources."""
        whole = hashlib.sha256()
        for text in (self.name, *self.labels):
            _update(whole, text.encode())
        for name, samples in self.splits.items():
            _update(whole, name.encode())
            samples._update_digest(whole)
        return f"sha256:{whole.hexdigest()}"

    def _check_labels(self) -> None:
        seen: set[int] = set()
        for name, samples in self.splits.items():
            present = {int(label) for label in np.unique(samples.labels)}
            if not present <= set(range(len(self.labels))):
                raise TaskError(f"split '{name}' of task '{self.name}' has a label number without a class")
            if name in TRAINING_SPLITS:
                self._refuse_missing(present, f"split '{name}' of task '{self.name}'")
            seen |= present
        self._refuse_missing(seen, f"task '{self.name}'")

    def _refuse_missing(self, present: set[int], where: str) -> None:
        missing = [label for number, label in enumerate(self.labels) if number not in present]
        if missing:
            raise TaskError(
                f"class '{missing[0]}' is empty in {where}",
                next_step="add images of it, or remove the class",
            )

    def _check_sources(self) -> None:
        owner: dict[str, str] = {}
        for name, samples in self.splits.items():
            for source in set(samples.sources):
                if source in owner:
                    raise TaskError(
                        f"'{source}' is in two splits of task '{self.name}': {owner[source]} and {name}",
                        why="a test on what was trained on measures nothing",
                        next_step="list it in one split only",
                    )
                owner[source] = name


def check_classes(name: str, labels: tuple[str, ...]) -> None:
    """Refuse a set of classes that nothing can be learnt from.

    Raises:
        TaskError: fewer than two, or two of the same name.
    """
    if len(labels) < 2:
        raise TaskError(
            f"task '{name}' has {'one class only' if labels else 'no class'}",
            why="a classification task needs at least two",
            next_step="add a class folder with images",
        )
    if len(set(labels)) != len(labels):
        raise TaskError(f"task '{name}' has two classes of the same name")


def _update(whole: hashlib._Hash, part: bytes) -> None:
    """Add one part with its length, so that no two lists of parts look the same."""
    whole.update(len(part).to_bytes(8, "little"))
    whole.update(part)
