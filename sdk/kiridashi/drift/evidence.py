"""What is held against the limits: a test martingale for each event, which starts anew at every frame.

While an event's share is at most its limit ``L``, the factor ``r / L`` for a frame that shows it and
``(1 - r) / (1 - L)`` for one that does not, with ``r > L``, is on average at most 1, whatever was seen before. So is
the product from any frame on. The evidence mixes the products over three ``r`` and over all starts ``s = 1, 2, …``
with weights ``1 / log2(s + 1) - 1 / log2(s + 2)``, which sum to 1: old calm does not weigh against a new change, and
it stays a non-negative supermartingale that begins at 1. By Ville's inequality (1939) it ever reaches ``1 / a`` with
probability at most ``a``.

The starts' weights are those of a prior on the moment of change, as in the procedure of Shiryaev (1963); they cost
about ``log s + 2 log log s`` of evidence, which is the price of a bound that holds for ever and not for each day.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
_REACH = np.array([0.15, 0.4, 0.8])
_FLOOR = -1e3


class Evidence(msgspec.Struct, frozen=True):
    """The state of the martingales of one set of tests.

    Attributes:
        frames: how many were taken.
        products: logarithms, [events][3].
        highest: of each event, the largest logarithm of the evidence so far.
        sums: of each event, the largest log likelihood ratio of a start in the past (CUSUM, Page 1954).
        starts: of each event, the frame at which that start lies: when the change probably came.
    """

    frames: int
    products: tuple[tuple[float, ...], ...]
    highest: tuple[float, ...]
    sums: tuple[float, ...]
    starts: tuple[int, ...]


def no_evidence(events: int) -> Evidence:
    """The beginning."""
    rows = ((_FLOOR,) * len(_REACH),) * events
    return Evidence(0, rows, (0.0,) * events, (0.0,) * events, (0,) * events)


@dataclass(frozen=True)
class _Bets:
    hit: Float64
    miss: Float64


def taken(evidence: Evidence, seen: NDArray[np.bool_], limits: Float64) -> Evidence:
    """The evidence after more frames.

    Args:
        evidence: so far.
        seen: which frames show which events, bool [n, events].
        limits: of the events, in (0, 1): float64 [events].
    """
    bets = _bets(limits)
    products, highest = np.array(evidence.products), np.array(evidence.highest)
    sums, starts = np.array(evidence.sums), np.array(evidence.starts)
    middle, share = len(_REACH) // 2, math.log(1 / len(_REACH))
    for number, row in enumerate(seen, start=evidence.frames + 1):
        step = np.where(row[:, None], bets.hit, bets.miss)
        products = np.maximum(np.logaddexp(products, share + math.log(_weight(number))) + step, _FLOOR)
        total = np.logaddexp(np.logaddexp.reduce(products, axis=1), math.log(_left(number)))
        highest = np.maximum(highest, total)
        sums = np.maximum(0.0, sums + step[:, middle])
        starts = np.where(sums == 0.0, number, starts)
    return Evidence(
        evidence.frames + len(seen),
        tuple(tuple(row) for row in products.tolist()),
        tuple(highest.tolist()),
        tuple(sums.tolist()),
        tuple(starts.tolist()),
    )


def _bets(limits: Float64) -> _Bets:
    bounded = np.clip(limits, 1e-9, 1 - 1e-9)[:, None]
    right = bounded + (1 - bounded) * _REACH
    return _Bets(np.log(right / bounded), np.log((1 - right) / (1 - bounded)))


def _weight(start: int) -> float:
    return _left(start - 1) - _left(start)


def _left(start: int) -> float:
    """The weight of all starts after ``start``."""
    return 1 / math.log2(start + 2)
