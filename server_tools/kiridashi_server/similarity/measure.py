"""What a similarity measure is, and the table of those there are.

A new measure is one module with a class like :class:`Measure`, and one entry in :data:`MEASURES`.
"""

from __future__ import annotations

from typing import Protocol

from kiridashi.errors import InputError

from kiridashi_server.bank.record import HEAD, MOMENTS, Record
from kiridashi_server.similarity.descriptor import Descriptor, Need
from kiridashi_server.similarity.frechet import Frechet
from kiridashi_server.similarity.kernel_distance import KernelDistance
from kiridashi_server.similarity.log_evidence import LogMe
from kiridashi_server.similarity.loo_leep import LooLeep
from kiridashi_server.similarity.neighbours import Neighbours
from kiridashi_server.similarity.score_ranks import ScoreRanks
from kiridashi_server.similarity.uniform import Uniform


class Measure(Protocol):
    """A number per record and target: larger means more similar. Pure and deterministic.

    All records share one backbone, so a measure of dense features alone gives every record the same value: it has
    to use something of the record's own, such as its head, its moments or its scores.
    """

    @property
    def name(self) -> str:
        """What the measure is called on the command line and in evidence."""
        ...

    @property
    def needs(self) -> tuple[Need, ...]:
        """What a record and a target must have; a record that lacks it has no similarity (:func:`what_is_missing`)."""
        ...

    def similarity(self, record: Record, target: Descriptor) -> float:
        """How much the record has to say about the target."""
        ...

    def zero_point(self, target: Descriptor) -> float | None:
        """The similarity at which a record is no better than knowing nothing; None if the measure has none."""
        ...


DEFAULT_MEASURE = "loo-leep"
_ALL: tuple[Measure, ...] = (
    Uniform(),
    Frechet(),
    KernelDistance(),
    LooLeep(),
    ScoreRanks(),
    Neighbours(),
    LogMe(),
)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _ALL}
"""From what costs nothing beyond one dense forward to what needs a forward for every record."""

_MISSING: dict[Need, str] = {
    "head": "it has no head",
    "moments": "it has no feature moments",
    "taylor": "it has no first-order scores to compare",
    "masked": "the samples were not run under its mask",
}


def find_measure(name: str) -> Measure:
    """The measure called ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in MEASURES:
        raise InputError(
            f"there is no similarity measure '{name}'", next_step=f"use one of: {', '.join(sorted(MEASURES))}"
        )
    return MEASURES[name]


def what_is_missing(measure: Measure, record: Record, target: Descriptor) -> str | None:
    """Why the measure cannot compare this record with this target, in words; None if it can."""
    has: dict[Need, bool] = {
        "head": not record.lacks(HEAD),
        "moments": not record.lacks(MOMENTS),
        "taylor": bool(record.taylor and target.taylor),
        "masked": record.id in target.masked,
    }
    return next((_MISSING[need] for need in measure.needs if not has[need]), None)
