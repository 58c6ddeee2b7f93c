"""Speed at equal accuracy: curves of accuracy over latency, compared, with bootstrap intervals.

A method's curve is the mean over tasks and seeds of its accuracy at each latency (linear in the logarithm between its
cuts), made monotone by isotonic regression (Barlow et al. 1972). Two curves are compared over the accuracies that both
reach: how much longer does one take than the other?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
_POINTS = 48
_LEAST_VALID = 0.95


@dataclass(frozen=True, eq=False)
class Curve:
    """Accuracy that does not fall, float64 [g], at logarithms of latency that rise, float64 [g]."""

    log_ms: FloatArray
    accuracy: FloatArray


@dataclass(frozen=True, eq=False)
class Cuts:
    """One method's cuts: latencies in milliseconds, float64 [k], and which test images each got right, bool [k, N]."""

    latency_ms: FloatArray
    right: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Trial:
    """One task and seed: what its test images show, int64 [N], equal where they show the same; cuts by method."""

    clusters: NDArray[np.int64]
    methods: Mapping[str, Cuts]


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval; None where the curves have nothing in common."""

    value: float | None
    ci95: tuple[float, float] | None


Statistic = Callable[[Mapping[str, Curve]], float]
"""A number from the curves by method; NaN if there is none."""


def estimate(trials: Sequence[Trial], statistics: Mapping[str, Statistic], seed: int) -> dict[str, Estimate]:
    """Statistics of the trials' curves with percentile intervals of a two-stage bootstrap.

    Trials are drawn with replacement, and in each the things that its test images show; all methods see the same draws.
    With a single trial the interval covers its images alone.
    """
    rng = np.random.default_rng(seed)
    tables = [_Table.of(trial) for trial in trials]
    found = _curves(tables, [np.ones(table.things) for table in tables])
    draws = []
    for _ in range(RESAMPLES):
        drawn = [tables[pick] for pick in rng.integers(len(tables), size=len(tables))]
        again = _curves(drawn, [rng.multinomial(one.things, np.full(one.things, 1 / one.things)) for one in drawn])
        draws.append([statistic(again) for statistic in statistics.values()])
    columns = dict(zip(statistics, np.array(draws).T, strict=True))
    return {name: _estimate(statistic(found), columns[name]) for name, statistic in statistics.items()}


def speed(ours: Curve, other: Curve) -> float:
    """Latency of the other over ours at equal accuracy: the geometric mean over the accuracies that both reach."""
    low = max(ours.accuracy[0], other.accuracy[0])
    high = min(ours.accuracy[-1], other.accuracy[-1])
    if not low < high:
        return float("nan")
    accuracies = np.linspace(low, high, _POINTS)
    return float(np.exp(np.mean(_reached(other, accuracies) - _reached(ours, accuracies))))


def advantage(ours: Curve, other: Curve) -> float:
    """Accuracy of ours minus the other's at equal latency: the mean over the latencies that both have."""
    low, high = max(ours.log_ms[0], other.log_ms[0]), min(ours.log_ms[-1], other.log_ms[-1])
    if not low < high:
        return float("nan")
    grid = np.linspace(low, high, _POINTS)
    return float(np.mean(_at(ours, grid) - _at(other, grid)))


def better(first: Curve, second: Curve) -> Curve:
    """At each latency that one of them has, the higher of both accuracies; a faster cut will do where there is time."""
    ends = [log_ms for curve in (first, second) for log_ms in curve.log_ms[[0, -1]]]
    grid = np.linspace(min(ends), max(ends), 2 * _POINTS)
    both = [np.interp(grid, curve.log_ms, curve.accuracy, left=-np.inf) for curve in (first, second)]
    return Curve(grid, np.maximum(*both))


def isotonic(values: FloatArray) -> FloatArray:
    """The sequence that does not fall and is nearest to ``values`` [n] in least squares, by the min-max formula."""
    n = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.ogrid[:n, :n]
    means = np.where(last >= first, (sums[last + 1] - sums[first]) / np.maximum(last - first + 1, 1), np.inf)
    smallest = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]  # over all ends from here on
    return np.asarray(np.where(first <= last, smallest, -np.inf).max(axis=0), dtype=np.float64)


def _at(curve: Curve, log_ms: FloatArray) -> FloatArray:
    return np.asarray(np.interp(log_ms, curve.log_ms, curve.accuracy), dtype=np.float64)


def _reached(curve: Curve, accuracies: FloatArray) -> FloatArray:
    """The smallest log latency at which each accuracy is reached."""
    after = np.clip(np.searchsorted(curve.accuracy, accuracies, side="left"), 1, len(curve.accuracy) - 1)
    low, high = curve.accuracy[after - 1], curve.accuracy[after]
    share = np.clip((accuracies - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)
    return np.asarray(curve.log_ms[after - 1] + share * (curve.log_ms[after] - curve.log_ms[after - 1]))


@dataclass(frozen=True, eq=False)
class _Table:
    """A trial with its images summed up by what they show: by method, log latencies [k] and right answers [k, c]."""

    sizes: FloatArray
    methods: Mapping[str, tuple[FloatArray, FloatArray]]

    @property
    def things(self) -> int:
        return len(self.sizes)

    @classmethod
    def of(cls, trial: Trial) -> _Table:
        shows = np.eye(int(trial.clusters.max()) + 1)[trial.clusters]
        methods = {}
        for name, cuts in trial.methods.items():
            order = np.argsort(cuts.latency_ms)
            methods[name] = (np.log(cuts.latency_ms[order]), cuts.right[order].astype(np.float64) @ shows)
        return cls(shows.sum(axis=0), methods)


def _curves(tables: Sequence[_Table], weights: Sequence[NDArray[np.float64 | np.int64]]) -> dict[str, Curve]:
    """Each method's curve, over the latencies that it has in all trials."""
    found = {}
    for name in tables[0].methods:
        ends = [table.methods[name][0][[0, -1]] for table in tables]
        grid = np.linspace(max(low for low, _ in ends), min(high for _, high in ends), _POINTS)
        parts = []
        for table, weight in zip(tables, weights, strict=True):
            log_ms, right = table.methods[name]
            parts.append(np.interp(grid, log_ms, right @ weight / (table.sizes @ weight)))
        found[name] = Curve(grid, isotonic(np.mean(parts, axis=0)))
    return found


def _estimate(value: float, draws: FloatArray) -> Estimate:
    valid = draws[np.isfinite(draws)]
    if not np.isfinite(value):
        return Estimate(None, None)
    if len(valid) < _LEAST_VALID * len(draws):
        return Estimate(value, None)
    low, high = np.quantile(valid, [0.025, 0.975])
    return Estimate(value, (float(low), float(high)))
