"""Many records' scores as one matrix, with what the robust mean needs of them worked out once.

The winsorised mean clips every vote to limits around the unit's median. The limits do not depend on the weights,
and with equal weights the mean does not either: a bank of thousands of records costs a pass over their scores only
when the set of records changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreArray, ScoreMap
from kiridashi_server.compose.robust import DEFAULT_SETTINGS, ComposeSettings, limits

SUMMARY_ROWS = 3
_ROWS_AT_ONCE = 256

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Vote:
    """A record's part in a stack: its id, the SHA-256 of its stored scores, and whether they are learnt."""

    record_id: str
    sha256: str
    learnt: bool


@dataclass(frozen=True, eq=False)
class ScoreStack:
    """Votes on one scale.

    Attributes:
        ids: record ids, ascending.
        sizes: units by group, in the order of the columns.
        matrix: float32 [records + 3, units]: a vote a row, then the lower and the upper limit of every unit's votes
            and the mean of the clipped votes. It may be a file.
    """

    ids: tuple[str, ...]
    sizes: Mapping[str, int]
    matrix: Matrix

    def covers(self, record_ids: Sequence[str]) -> bool:
        """Whether these are the stacked records."""
        return len(record_ids) == len(self.ids) and set(record_ids) == self._places.keys()

    def mean(self, weights: Mapping[str, float], own: tuple[ScoreMap, float] | None = None) -> dict[str, ScoreArray]:
        """The robust mean of the votes, by group, float32 [size].

        Args:
            weights: by record id, for every stacked record.
            own: one more vote, clipped to the limits of the others, and its weight.
        """
        low, high, middle = self.matrix[-SUMMARY_ROWS:]
        values = np.array([weights[name] for name in self.ids])
        if np.allclose(values, values[0], rtol=1e-9):
            total = values.sum() * middle.astype(np.float64)
        else:
            total = np.zeros(len(low))
            for start in range(0, len(self.ids), _ROWS_AT_ONCE):
                rows = self.matrix[start : min(start + _ROWS_AT_ONCE, len(self.ids))]
                total += values[start : start + len(rows)].astype(np.float32) @ np.clip(rows, low, high)
        if own is not None:
            vote, weight = own
            total += weight * np.clip(np.concatenate([vote[name] for name in self.sizes]), low, high)
        return split(total.astype(np.float32), self.sizes)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {name: place for place, name in enumerate(self.ids)}


def flatten(scores: ScoreMap, sizes: Mapping[str, int], record_id: str) -> Matrix:
    """A vote as a row, float32 [units].

    Raises:
        InputError: it has other groups or sizes.
    """
    if {name: len(values) for name, values in scores.items()} != dict(sizes):
        raise InputError(
            f"the scores of record {record_id[:12]} cannot be combined with the others",
            why="its groups or their sizes differ",
            next_step=f"kiridashi bank forget {record_id[:12]}, then learn the task again: kiridashi bank learn",
        )
    return np.concatenate([scores[name] for name in sizes])


def split(row: Matrix, sizes: Mapping[str, int]) -> dict[str, ScoreArray]:
    """A row as scores by group."""
    borders = np.cumsum(list(sizes.values()))[:-1]
    return dict(zip(sizes, np.split(row, borders), strict=True))


def summarise(matrix: Matrix, sizes: Mapping[str, int], settings: ComposeSettings = DEFAULT_SETTINGS) -> None:
    """Fill the last three rows of a stack's matrix from the others, in place."""
    votes = matrix[:-SUMMARY_ROWS]
    start = 0
    for size in sizes.values():
        columns = slice(start, start + size)
        group = np.asarray(votes[:, columns], dtype=np.float64)
        low, high = limits(group, settings)
        matrix[-3, columns], matrix[-2, columns] = low, high
        matrix[-1, columns] = np.clip(group, low, high, out=group).mean(axis=0)
        start += size
