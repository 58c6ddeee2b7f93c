"""What is known after one of the bank's tasks has played the new one: how well the others' scores served it.

A task that is *assessed* is cut by every other task's scores alone, by their plain mean, by their means tilted by each
measure, and by its own few-shot scores. All cuts keep the same share, are repaired and get a ridge head, from a few
samples per class; accuracy is measured on the task's validation samples. One assessment is one row of the utility
matrix, with the similarities and the label-free statistics that a new task could have shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

UNIFORM = "uniform"

STATISTICS = ("dense", "retained", "telling")
"""What the gain is predicted from, all of it from the few labelled samples, none from validation or test samples:
leave-one-out accuracy of a ridge head on dense features; what is added to it under the mask of the bank's plain mean
(most often below 0); and the mean over records of LOO-LEEP above its zero point, in nats (0 without heads)."""


class AssessSettings(msgspec.Struct, frozen=True):
    """How tasks are assessed; assessments of different settings are never mixed.

    Attributes:
        share: of the dense parameters, kept by every cut.
        per_class: samples per class that the task may use, as a new line would.
        tilt: how strongly similarity moves weights in the tilted compositions.
        iterations: of learning the task's own scores.
        seed: of everything random.
    """

    share: float = 0.3
    per_class: int = 6
    tilt: float = 1.0
    iterations: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.per_class < 2 or self.tilt <= 0 or self.iterations < 1:
            raise InputError(
                f"assessment settings are out of range: {self}",
                why="the share is in (0, 1], samples per class at least 2, the tilt above 0, iterations at least 1",
            )


DEFAULT_SETTINGS = AssessSettings()


class Assessment(msgspec.Struct, frozen=True):
    """One task's row of the utility matrix; cells that are not measured yet are missing.

    Attributes:
        task, task_digest: the task, and the digest of its samples.
        backbone_fingerprint, layout_digest: what was cut.
        settings: how.
        records: ids of the task's own records, which had no part in it.
        own: accuracy of the cut by the task's own few-shot scores, None until measured.
        utilities: by record id, accuracy of the cut by its scores alone.
        compared: ids of the records behind what follows; when the bank has changed, it is measured anew.
        similarities: by measure, by record id.
        composed: by measure, accuracy of the cut by the records' scores tilted by it; ``uniform`` is the plain mean.
        statistics: see :data:`STATISTICS`.
    """

    task: str
    task_digest: str
    backbone_fingerprint: str
    layout_digest: str
    settings: AssessSettings
    records: tuple[str, ...] = ()
    own: float | None = None
    utilities: dict[str, float] = {}
    compared: tuple[str, ...] = ()
    similarities: dict[str, dict[str, float]] = {}
    composed: dict[str, float] = {}
    statistics: dict[str, float] = {}

    @property
    def is_complete(self) -> bool:
        """Whether the bank's plain mean and the task's own scores have both been measured."""
        return self.own is not None and UNIFORM in self.composed and set(STATISTICS) <= set(self.statistics)

    def changed(self, **values: Any) -> Assessment:
        """A copy with other values."""
        return msgspec.structs.replace(self, **values)

    def without(self, record_id: str) -> Assessment | None:
        """What is left when a record is forgotten: None if it is the task's own, else what was measured without it."""
        if record_id in self.records:
            return None
        utilities = {key: value for key, value in self.utilities.items() if key != record_id}
        if record_id not in self.compared:
            return self.changed(utilities=utilities)
        return self.changed(utilities=utilities, compared=(), similarities={}, composed={}, statistics={})


def usable_assessments(
    assessments: Sequence[Assessment], fingerprint: str, layout_digest: str
) -> tuple[Assessment, ...]:
    """Complete assessments of this backbone and layout, one a task, all of the settings that most of them have.

    They are in the order of their digests, which has nothing to do with what was measured.
    """
    groups: defaultdict[AssessSettings, dict[str, Assessment]] = defaultdict(dict)
    for assessment in assessments:
        place = (assessment.backbone_fingerprint, assessment.layout_digest)
        if assessment.is_complete and place == (fingerprint, layout_digest):
            groups[assessment.settings][assessment.task_digest] = assessment
    if not groups:
        return ()
    settings = max(groups, key=lambda key: (len(groups[key]), repr(key)))
    return tuple(groups[settings][digest] for digest in sorted(groups[settings]))


def gains(assessments: Sequence[Assessment]) -> npt.NDArray[np.float64]:
    """What the bank's plain mean gains over the task's own scores, in accuracy, float64 [tasks].

    Raises:
        InputError: an assessment is not complete.
    """
    unfinished = [assessment.task for assessment in assessments if not assessment.is_complete]
    if unfinished:
        raise InputError(f"'{unfinished[0]}' is not fully assessed", next_step="kiridashi bank assess")
    return np.array([a.composed[UNIFORM] - (a.own or 0.0) for a in assessments])


def statistics_of(assessments: Sequence[Assessment]) -> npt.NDArray[np.float64]:
    """The statistics of complete assessments, float64 [tasks, 3]."""
    rows = [[assessment.statistics[name] for name in STATISTICS] for assessment in assessments]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(STATISTICS))
