"""What score learning gives: one number per unit of every scored group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

ScoreArray: TypeAlias = npt.NDArray[np.float32]
ScoreMap: TypeAlias = Mapping[str, ScoreArray]
"""Scores by group name, float32 [size of the group]; a higher score means: keep."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The outcome of one score-learning run.

    Attributes:
        groups: the raw scores; normalisation is a choice of composition, never made here.
        iterations: optimiser steps taken.
        seconds: wall time of the run.
        dense_accuracy: of the task's own ridge head on the uncut backbone, on the validation samples.
        masked_accuracy: by kept share of parameters, of a fresh ridge head on the masked backbone, without repair
            and without any tuning.
    """

    groups: ScoreMap
    iterations: int
    seconds: float
    dense_accuracy: float
    masked_accuracy: Mapping[float, float]


def check_scores(scores: ScoreMap, sizes: Mapping[str, int]) -> None:
    """Refuse scores that do not fit the groups.

    Args:
        scores: the scores to check.
        sizes: units by group name, as the layout has them.

    Raises:
        InputError: an unknown group, a wrong size, a value that is not finite, or no group at all.
    """
    if not scores:
        raise InputError("no group has scores", next_step="learn scores for this backbone's layout")
    for name, values in scores.items():
        if name not in sizes:
            raise InputError(
                f"scores name the group '{name}', which the layout does not have",
                why="they were learnt for another backbone or another layout",
                next_step="learn them again: kiridashi bank learn",
            )
        if values.shape != (sizes[name],):
            raise InputError(
                f"group '{name}' has {sizes[name]} units but scores of shape {list(values.shape)}",
                next_step="learn them again: kiridashi bank learn",
            )
        if not np.isfinite(values).all():
            raise InputError(f"scores of group '{name}' hold values that are not finite")
