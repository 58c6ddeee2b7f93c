"""How far apart frames have to be, so that one hardly tells of the next.

Pictures of a line come in runs: the same part, the same light. Tests that take them for independent draws alarm on any
such stream. So only every k-th frame is used, where k is the first lag at which no statistic's autocorrelation,
taken over ranks, is above 0.1 (or what noise alone reaches in a short stream).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MAX_CORRELATION = 0.1
_NOISE = 3.0
_CLASSES = 8
Float64 = NDArray[np.float64]


def stride(rows: Float64, best: NDArray[np.int64]) -> int:
    """The lag, for rows [n, statistics] and best classes [n] in the order of time; ``n`` when none will do."""
    n = len(rows)
    if n < 2:
        return max(n, 1)
    common = np.argsort(-np.bincount(best), kind="stable")[:_CLASSES]
    columns = np.hstack([rows, (best[:, None] == common[None, :]).astype(np.float64)])
    ranks = np.apply_along_axis(_ranks, 0, columns)
    ranks -= ranks.mean(axis=0)
    spectrum = np.fft.rfft(ranks, 2 * n, axis=0)
    sums = np.fft.irfft(np.abs(spectrum) ** 2, 2 * n, axis=0)[:n]
    moving = sums[0] > 1e-9 * n
    if not moving.any():
        return 1
    correlation = sums[:, moving] / sums[0, moving]
    small = (correlation < max(MAX_CORRELATION, _NOISE / math.sqrt(n))).all(axis=1)
    small[0] = False
    return int(np.argmax(small)) if small.any() else n


def _ranks(column: Float64) -> Float64:
    """Ranks in which equal values share their mean rank."""
    values, places, counts = np.unique(column, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: Float64 = (ends - (counts - 1) / 2)[places.reshape(-1)]
    return middle if len(values) > 1 else np.zeros(len(column))
