"""Paired differences over tasks, with intervals and Holm's correction, from the cells of the benchmark of reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.report import Figure

FloatArray = NDArray[np.float64]
Key = tuple[str, str, int]
"""Method, limit and iterations."""
Table = Mapping[Key, Mapping[int, FloatArray]]
"""Values of one kind by key and seed, float64 [tasks]."""

CONFIDENCE = 0.95


def tabulate(rows: Sequence[Mapping[str, Any]], value: str = "accuracy") -> dict[Key, dict[int, FloatArray]]:
    """The rows' values by key and seed, one for each task in the order of their names.

    Seeds that a key was run with for some of the tasks only are left out: what is paired has to be whole.
    """
    tasks = sorted({str(row["task"]) for row in rows})
    cells: dict[Key, dict[int, dict[str, float]]] = {}
    for row in rows:
        key = (str(row["method"]), str(row["limit"]), int(row["iterations"]))
        cells.setdefault(key, {}).setdefault(int(row["seed"]), {})[str(row["task"])] = float(row[value])
    table = {
        key: {seed: np.array([of[task] for task in tasks]) for seed, of in seeds.items() if len(of) == len(tasks)}
        for key, seeds in cells.items()
    }
    return {key: seeds for key, seeds in table.items() if seeds}


def over_seeds(table: Table, key: Key, like: Key | None = None) -> FloatArray:
    """The mean over seeds for each task, float64 [tasks]; over the seeds that ``like`` has too, if it is given.

    Raises:
        KeyError: there is no such key, or no such seed.
    """
    seeds = table[key].keys() & table[like or key].keys()
    if not seeds:
        raise KeyError(key)
    mean: FloatArray = np.mean([table[key][seed] for seed in sorted(seeds)], axis=0)
    return mean


def gain(ours: FloatArray, other: FloatArray) -> Figure:
    """The mean paired difference over tasks in points, with its t interval."""
    differences = 100 * (ours - other)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Figure(mean, "points")
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    return Figure(mean, "points", (mean - reach, mean + reach))


def p_value(ours: FloatArray, other: FloatArray) -> float:
    """Of the two-sided paired t test over tasks; 1 where nothing differs."""
    differences = ours - other
    if len(differences) < 2 or not differences.any():
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values that hold for all comparisons at once (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Ours against rivals, each with a number of iterations of its own, at every limit where both were run whole."""

    ours: tuple[str, int]
    rivals: Sequence[str]
    iterations: int

    def pairs(self, table: Table) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Our values and the rival's by ``RIVAL@LIMIT``, of the seeds that both were run with."""
        found = {}
        for rival in self.rivals:
            for limit in dict.fromkeys(limit for _, limit, _ in table):
                ours, other = (self.ours[0], limit, self.ours[1]), (rival, limit, self.iterations)
                if table.get(ours, {}).keys() & table.get(other, {}).keys():
                    found[f"{rival}@{limit}"] = over_seeds(table, ours, other), over_seeds(table, other, ours)
        return found

    def gains(self, table: Table) -> dict[str, Figure]:
        """Ours minus the rival's."""
        return {name: gain(ours, other) for name, (ours, other) in self.pairs(table).items()}

    def p_values(self, table: Table) -> dict[str, float]:
        """Holm-adjusted over these comparisons."""
        return holm({name: p_value(ours, other) for name, (ours, other) in self.pairs(table).items()})
