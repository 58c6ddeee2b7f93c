"""Events that a reference bounds: of each, at most what share of frames has it, if nothing has changed.

A statistic's events are cut at order statistics of ``n`` reference frames. How much probability lies below the
``k``-th smallest of ``n`` values is Beta(k, n + 1 - k) distributed, whatever the statistic's own distribution (Wilks
1941); ties make it smaller. So the quantile ``1 - delta`` of that law bounds the event's share with probability
``1 - delta``. The share of a class that the reference has ``c`` times is bounded as Clopper and Pearson (1934) do; it
is the same law with ``k = c + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from kiridashi.drift.report import Signal
from kiridashi.drift.statistics import IMAGE_NAMES, NAMES

SHARES = (0.05, 0.25, 0.5)
MAX_CLASSES = 32
OTHER = -1
_STEPS = 60
Float64 = NDArray[np.float64]


class Event(msgspec.Struct, frozen=True):
    """Something a frame can show; ``limit`` bounds its share while nothing has changed.

    For a statistic (``column`` of ``NAMES``) it is a value below ``low`` or above ``high``, or with ``inside`` one
    between them. With ``column`` None it is that the best class is ``best``, or with ``inside`` that it is not;
    ``-1`` stands for all classes that are not named.
    """

    name: str
    change: str
    signal: Signal
    limit: float
    column: int | None = None
    low: float | None = None
    high: float | None = None
    inside: bool = False
    best: int = OTHER


class EventSet(msgspec.Struct, frozen=True):
    """The events of one reference: of ``frames`` frames, whose medians are ``medians``.

    ``named`` are the classes with events of their own (the first 32), and ``shares`` how often each was the best.
    """

    frames: int
    events: tuple[Event, ...]
    medians: tuple[float, ...]
    named: tuple[int, ...]
    shares: tuple[float, ...]


def make_events(rows: Float64, best: NDArray[np.int64], labels: Sequence[str], delta: float) -> EventSet:
    """The events of a reference.

    Args:
        rows: statistics of the reference's frames, which stand for independent draws: [n, len(NAMES)].
        best: their best classes [n].
        labels: the classes.
        delta: the probability that any of the limits is too low, at most.
    """
    n, classes = len(rows), len(labels)
    counts = np.bincount(best, minlength=classes)
    named = tuple(range(min(classes, MAX_CLASSES)))  # not the most frequent: chosen after looking, limits would be low
    groups = (*named, OTHER) if classes > len(named) else named
    each = delta / (len(NAMES) * 2 * (len(SHARES) + 1) + 2 * len(groups))
    ordered = np.sort(rows, axis=0)
    events = [event for column in range(rows.shape[1]) for event in _of_statistic(column, ordered[:, column], each)]
    for c in groups:
        count = n - int(counts[list(named)].sum()) if c == OTHER else int(counts[c])
        events += _of_class(c, "another class" if c == OTHER else labels[c], (count, n), each)
    return EventSet(
        frames=n,
        events=tuple(event for event in events if event.limit < 1.0),
        medians=tuple(float(value) for value in np.median(rows, axis=0)),
        named=named,
        shares=tuple(float(counts[c]) / n for c in named),
    )


def occurrences(events: EventSet, rows: Float64, best: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which frames show which events: bool [n, events]."""
    known = np.where(np.isin(best, events.named), best, OTHER)
    seen = np.empty((len(rows), len(events.events)), bool)
    for n, event in enumerate(events.events):
        if event.column is None:
            seen[:, n] = (known == event.best) != event.inside
            continue
        x = rows[:, event.column]
        low = -math.inf if event.low is None else event.low
        high = math.inf if event.high is None else event.high
        seen[:, n] = (low < x) & (x < high) if event.inside else (x < low) | (x > high)
    return seen


@lru_cache(maxsize=512)
def share_limit(k: int, n: int, delta: float) -> float:
    """The quantile ``1 - delta`` of Beta(k, n + 1 - k): 1 for ``k > n``.

    It is the ``x`` at which a binomial count of ``n`` trials is below ``k`` with probability ``delta``.
    """
    if k > n:
        return 1.0
    count = np.arange(k)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k)])
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        x = (low + high) / 2
        log_terms = ways + count * math.log(x) + (n - count) * math.log1p(-x)
        if float(np.exp(log_terms).sum()) > delta:
            low = x
        else:
            high = x
    return high


def _of_statistic(column: int, ordered: Float64, delta: float) -> list[Event]:
    """Low, high, far from the middle and near it, where the reference is large enough for them."""
    n, name = len(ordered), NAMES[column]
    signal: Signal = "image" if name in IMAGE_NAMES else "outputs"
    events = []
    for share in SHARES:
        k = max(1, math.floor(share * (n + 1)))
        low, high, limit = float(ordered[k - 1]), float(ordered[n - k]), share_limit(k, n, delta)
        point = f"{share:.0%}" if share != 0.5 else "half"
        events += [
            Event(name, f"lower (lowest {point})", signal, limit, column, low=low),
            Event(name, f"higher (highest {point})", signal, limit, column, high=high),
        ]
    k = max(1, math.floor(SHARES[0] * (n + 1)))
    low, high = float(ordered[k - 1]), float(ordered[n - k])
    events.append(Event(name, "more spread", signal, share_limit(2 * k, n, delta), column, low=low, high=high))
    k = max(1, math.floor(SHARES[1] * (n + 1)))
    low, high = float(ordered[k - 1]), float(ordered[n - k])
    events.append(
        Event(name, "less spread", signal, share_limit(n + 1 - 2 * k, n, delta), column, low, high, inside=True)
    )
    return events


def _of_class(number: int, name: str, seen: tuple[int, int], delta: float) -> list[Event]:
    """More often and less often than in the reference, where it was ``seen`` so often of so many."""
    count, n = seen
    more, fewer = share_limit(count + 1, n, delta), share_limit(n - count + 1, n, delta)
    return [
        Event(name, "more often", "classes", more, best=number),
        Event(name, "less often", "classes", fewer, best=number, inside=True),
    ]
