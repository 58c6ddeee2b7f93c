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
Table = Mapping[tuple[str, int, int], FloatArray]
"""Accuracy by method, kept per cent and iterations: the mean over seeds for each task, float64 [tasks]."""

CONFIDENCE = 0.95


def tabulate(rows: Sequence[Mapping[str, Any]], value: str = "accuracy") -> dict[tuple[str, int, int], FloatArray]:
    """The rows' values by method, size and iterations, one for each task in the order of their names.

    Combinations that were not run for all tasks and seeds that occur are left out: what is paired has to be whole.
    """
    pairs = sorted({(str(row["task"]), int(row["seed"])) for row in rows})
    tasks = sorted({task for task, _ in pairs})
    cells: dict[tuple[str, int, int], dict[tuple[str, int], float]] = {}
    for row in rows:
        key = (str(row["method"]), int(row["kept"]), int(row["iterations"]))
        cells.setdefault(key, {})[str(row["task"]), int(row["seed"])] = float(row[value])
    return {
        key: np.array([np.mean([found[pair] for pair in pairs if pair[0] == task]) for task in tasks])
        for key, found in cells.items()
        if found.keys() == set(pairs)
    }


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
    """Ours against rivals, each with a number of iterations of its own, at every size where both were run whole."""

    ours: tuple[str, int]
    rivals: Sequence[str]
    iterations: int

    def pairs(self, table: Table) -> dict[str, tuple[FloatArray, FloatArray]]:
        """Our values and the rival's by ``RIVAL@KEPT``."""
        method, steps = self.ours
        return {
            f"{rival}@{kept}": (table[method, kept, steps], table[rival, kept, self.iterations])
            for rival in self.rivals
            for kept in sorted({kept for _, kept, _ in table}, reverse=True)
            if (method, kept, steps) in table and (rival, kept, self.iterations) in table
        }

    def gains(self, table: Table) -> dict[str, Figure]:
        """Ours minus the rival's."""
        return {name: gain(ours, other) for name, (ours, other) in self.pairs(table).items()}

    def p_values(self, table: Table) -> dict[str, float]:
        """Holm-adjusted over these comparisons."""
        return holm({name: p_value(ours, other) for name, (ours, other) in self.pairs(table).items()})
