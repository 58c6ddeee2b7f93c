"""Bad records: what a fault, a mix-up or bad will may put into a bank in place of a fifth of its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.bank.record import Record

SHARE = 0.2
MISSING = "missing"
"""Not poison: the records that would be bad are left out. What the others do worse than this is the harm."""

_HUGE = 1e4

Poison = Callable[[ScoreMap, ScoreMap, np.random.Generator], ScoreMap]
"""From a record's scores, another record's, and a generator to bad scores."""


def _inverted(own: ScoreMap, other: ScoreMap, generator: np.random.Generator) -> ScoreMap:
    return {name: values.max() + values.min() - values for name, values in own.items()}


def _random(own: ScoreMap, other: ScoreMap, generator: np.random.Generator) -> ScoreMap:
    return {name: generator.permutation(values) for name, values in own.items()}


def _huge(own: ScoreMap, other: ScoreMap, generator: np.random.Generator) -> ScoreMap:
    return {name: np.float32(_HUGE) * generator.permutation(values) for name, values in own.items()}


def _anothers(own: ScoreMap, other: ScoreMap, generator: np.random.Generator) -> ScoreMap:
    return other


POISONS: Mapping[str, Poison] = {"inverted": _inverted, "random": _random, "huge": _huge, "anothers": _anothers}
"""The best units last; units in any order; the same, ten thousand times as large; the scores of another task."""


def poisoned(records: Sequence[Record], kind: str, seed: int) -> list[Record]:
    """The records with a fifth of them, drawn at random and the same for every kind, made bad.

    Args:
        records: of one layout, at least two.
        kind: of :data:`POISONS`, or :data:`MISSING`.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    bad = {int(place) for place in generator.permutation(len(records))[: math.ceil(SHARE * len(records))]}
    if kind == MISSING:
        return [record for place, record in enumerate(records) if place not in bad]
    return [
        replace(record, scores=POISONS[kind](record.scores, records[place - 1].scores, generator))
        if place in bad
        else record
        for place, record in enumerate(records)
    ]
