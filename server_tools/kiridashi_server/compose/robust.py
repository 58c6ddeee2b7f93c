"""Limits for votes: how far from the others' median one may lie before it is pulled back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NORMAL_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ComposeSettings:
    """How scores are combined.

    Attributes:
        outlier_limit: a record's score may lie this many robust standard deviations from the median.
        robust_from: records needed before outliers can be told from spread.
    """

    outlier_limit: float = 3.0
    robust_from: int = 4


DEFAULT_SETTINGS = ComposeSettings()


def limits(votes: FloatArray, settings: ComposeSettings) -> tuple[FloatArray, FloatArray]:
    """The lowest and the highest vote that counts as it is, for every unit of a group, float64 [size] each.

    The scale of a unit's spread is its median absolute deviation over the votes, but not less than the median of that
    over its group: a unit on which most votes agree to the digit must not silence the rest. With few votes there are
    no limits.

    Args:
        votes: float64 [votes, size].
        settings: how far a vote may lie out.
    """
    size = votes.shape[1]
    if len(votes) < settings.robust_from:
        return np.full(size, -np.inf), np.full(size, np.inf)
    middle = np.median(votes, axis=0)
    spread = np.median(np.abs(votes - middle), axis=0) * _NORMAL_MAD
    reach = settings.outlier_limit * np.maximum(spread, np.median(spread))
    return middle - reach, middle + reach
