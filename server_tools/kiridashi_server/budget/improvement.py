"""Better solutions near a solution: widen what still fits, then exchange."""

from __future__ import annotations

import numpy as np

from kiridashi_server.budget.problem import FloatArray, IntArray, Problem


def widened(problem: Problem, solution: IntArray, prices: FloatArray) -> IntArray:
    """Widen one group by one step, as long as one fits: always the one that gains most for its priced cost.

    Args:
        problem: what is solved.
        solution: one that fits, int64 [G].
        prices: of the resources, float64 [R].
    """
    widest, steps = problem.widest, np.eye(len(solution), dtype=np.int64)
    current = solution.copy()
    while True:
        candidates = current + steps[current < widest]
        candidates = candidates[problem.fits(candidates)] if len(candidates) else candidates
        if not len(candidates):
            return current
        gains = problem.value(candidates) - problem.value(current)
        costs = (problem.excess(candidates) - problem.excess(current)) @ (prices + 1e-9)
        current = candidates[int((gains / (costs + 1e-15)).argmax())]


def exchanged(problem: Problem, solution: IntArray, prices: FloatArray) -> IntArray:
    """Narrow one group by a step and widen another, as long as that gains; the result is widened too.

    The arguments are those of :func:`widened`.
    """
    current = widened(problem, solution, prices)
    tried = 0
    while tried < len(current):
        for group in range(len(current)):
            better = _exchanged_for(problem, current, group)
            tried = tried + 1 if better is None else 0
            current = current if better is None else widened(problem, better, prices)
    return current


def _exchanged_for(problem: Problem, current: IntArray, group: int) -> IntArray | None:
    """The best solution that fits and is worth more, with one step less of ``group`` and one step more of another."""
    if current[group] == 0:
        return None
    candidates = current + np.eye(len(current), dtype=np.int64)[current < problem.widest]
    candidates[:, group] -= 1
    values = problem.value(candidates)
    worth = values > problem.value(current) * (1 + 1e-12)
    worth[worth] = problem.fits(candidates[worth])
    return candidates[worth][int(values[worth].argmax())] if worth.any() else None
