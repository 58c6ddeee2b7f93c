"""Confidence intervals of latency quantiles, for runs that depend on each other.

A quantile's interval lies between two order statistics, whose ranks follow from the binomial distribution: nothing is
assumed of how latencies are distributed. But the runs of a device come in stretches, fast while it is cool or alone,
so they tell less than as many independent runs. How much less follows from the autocorrelation of "was this run below
the quantile?", summed as long as the sums of neighbouring pairs are positive (Geyer 1992, initial positive sequence);
the ranks are those for so many independent runs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CHANCE = 0.05
"""An interval misses the true quantile with this probability."""


def quantile_interval(times: NDArray[np.float64], level: float, chance: float = CHANCE) -> tuple[float, float] | None:
    """The interval of the quantile ``level``; ``None`` when the runs are too few to bound it on both sides.

    Args:
        times: latencies in the order of the runs, [n].
        level: between 0 and 1.
        chance: of missing it, half on each side.
    """
    runs = independent_runs(times, level)
    ranks = _ranks(runs, level, chance)
    if ranks is None:
        return None
    low, high = np.quantile(times, [rank / (runs + 1) for rank in ranks], method="weibull")
    return float(low), float(high)


def independent_runs(times: NDArray[np.float64], level: float = 0.5) -> int:
    """How many independent runs would tell as much of the quantile, between 1 and n."""
    below = (times <= np.quantile(times, level)).astype(np.float64)
    below -= below.mean()
    n = len(below)
    spectrum = np.fft.rfft(below, 2 * n)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:n]
    if n < 2 or correlation[0] <= 0:
        return n
    correlation /= correlation[0]
    pairs = correlation[: n - n % 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    time_ = 2 * pairs[: negative[0] if len(negative) else len(pairs)].sum() - 1
    return max(1, min(n, int(n / max(time_, 1.0))))


def _ranks(runs: int, level: float, chance: float) -> tuple[int, int] | None:
    """The two ranks, from 1, between which the quantile of ``runs`` independent ones lies."""
    below = np.cumsum(_binomial(runs, level))
    # Rank r is at or below the quantile if at least r runs are: P(B < r) is the chance that it is not.
    low = int(np.searchsorted(below, chance / 2, side="right"))
    high = int(np.searchsorted(below, 1 - chance / 2, side="left")) + 1
    return (low, high) if low >= 1 and high <= runs else None


def _binomial(runs: int, level: float) -> NDArray[np.float64]:
    """The probabilities of 0 … ``runs`` successes."""
    k = np.arange(runs + 1)
    factorials = np.array([math.lgamma(n + 1) for n in range(runs + 1)])
    logs = factorials[runs] - factorials[k] - factorials[runs - k] + k * math.log(level)
    return np.asarray(np.exp(logs + (runs - k) * math.log1p(-level)))
