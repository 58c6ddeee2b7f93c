"""What a similarity measure is, and the table of those there are.

A new measure is one module with a class like :class:`Measure`, and one entry in :data:`MEASURES`.
"""

from __future__ import annotations

from typing import Protocol

from kiridashi.errors import InputError

from kiridashi_server.bank.record import HEAD, Record
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.frechet import Frechet
from kiridashi_server.similarity.loo_leep import LooLeep
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
    def needs(self) -> tuple[str, ...]:
        """Arrays that a record must have, by field name; one without them cannot be judged."""
        ...

    def similarity(self, record: Record, target: Descriptor) -> float:
        """How much the record has to say about the target."""
        ...

    def zero_point(self, target: Descriptor) -> float | None:
        """The similarity at which a record is no better than knowing nothing; None if the measure has none."""
        ...


DEFAULT_MEASURE = "loo-leep"
MEASURES: dict[str, Measure] = {measure.name: measure for measure in (LooLeep(), Uniform(), Frechet())}


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


def what_is_missing(measure: Measure, record: Record) -> str | None:
    """Why the measure cannot judge the record, in words; None if it can."""
    if not record.lacks(measure.needs):
        return None
    lacking = "head" if record.lacks(HEAD) and set(measure.needs) & set(HEAD) else "feature moments"
    return f"it has no {lacking}"
