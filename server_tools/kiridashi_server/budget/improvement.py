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
    groups = len(current)
    narrower, wider = np.divmod(np.arange(groups * groups), groups)
    changes = np.zeros((groups * groups, groups), dtype=np.int64)
    changes[np.arange(groups * groups), narrower] -= 1
    changes[np.arange(groups * groups), wider] += 1
    changes = changes[narrower != wider]
    while True:
        candidates = current + changes
        allowed = (candidates >= 0).all(axis=1) & (candidates <= problem.widest).all(axis=1)
        candidates = candidates[allowed]
        gains = problem.value(candidates) - problem.value(current)
        better = candidates[gains > 1e-12 * abs(float(problem.value(current)))]
        better = better[problem.fits(better)]
        if not len(better):
            return current
        current = widened(problem, better[int(problem.value(better).argmax())], prices)
