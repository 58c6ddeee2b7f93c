"""Confidence intervals for accuracy that do not mistake many views of few things for many things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kiridashi_server.tasks.errors import TaskError

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with the lower and upper end of its confidence interval."""

    mean: float
    low: float
    high: float


def accuracy_interval(
    correct: NDArray[np.bool_], clusters: NDArray[np.int64] | Sequence[str], seed: int, level: float = 0.95
) -> Interval:
    """Accuracy, 0 to 1, with a percentile interval of the cluster bootstrap.

    Whole clusters are drawn with replacement (Davison & Hinkley 1997, Bootstrap Methods and their Application,
    section 3.8), so views of one drawing or part count as the one thing they are. With few clusters such an interval
    is somewhat too narrow, and when everything is right it has no width.

    Args:
        correct: bool [N], whether each prediction was right.
        clusters: N numbers or names, equal for samples of one source (``Samples.clusters`` or ``Samples.sources``).
        seed: of the resampling.
        level: probability that the interval should cover the truth with.

    Raises:
        TaskError: lengths differ, fewer than two clusters, or a level outside 0 to 1.
    """
    return _bootstrap(np.asarray(correct, dtype=np.float64), clusters, seed, level)


def paired_difference_interval(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    clusters: NDArray[np.int64] | Sequence[str],
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Accuracy of *a* minus accuracy of *b* on the same samples, -1 to 1, with an interval as above.

    Pairing takes out what makes a sample easy or hard for both.

    Raises:
        TaskError: lengths differ, fewer than two clusters, or a level outside 0 to 1.
    """
    if np.shape(correct_a) != np.shape(correct_b):
        raise TaskError(
            "a paired comparison needs the same samples on both sides",
            why=f"got {np.shape(correct_a)} and {np.shape(correct_b)}",
        )
    difference = np.asarray(correct_a, dtype=np.float64) - np.asarray(correct_b, dtype=np.float64)
    return _bootstrap(difference, clusters, seed, level)


def _bootstrap(values: NDArray[np.float64], clusters: Any, seed: int, level: float) -> Interval:
    if values.ndim != 1 or len(values) != len(clusters):
        raise TaskError(f"an interval needs one cluster per sample: {values.shape} against {len(clusters)}")
    if not 0 < level < 1:
        raise TaskError(f"a confidence level of {level} cannot be used", why="it lies between 0 and 1")
    member = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(member)
    if len(sizes) < 2:
        raise TaskError("an interval needs samples of at least two sources", why=f"got {len(sizes)}")
    sums = np.bincount(member, weights=values)
    draws = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES)
    low, high = np.quantile((draws @ sums) / (draws @ sizes), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
