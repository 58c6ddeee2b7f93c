"""Prices of the limits: the upper bound that Lagrangian relaxation gives, by column generation.

For any prices μ >= 0, D(μ) = max over solutions of value - μ · excess is at least the value of every solution that
keeps the limits. D is the maximum of one plane per solution, so its minimum is approached from below by the planes of
the solutions found so far (Kelley 1960; seen from the other side, Dantzig and Wolfe's decomposition): the master
problem is the best mixture of these solutions that keeps the limits on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kiridashi.errors import BudgetError
from scipy.optimize import linprog

from kiridashi_server.budget.elimination import Box, Elimination
from kiridashi_server.budget.problem import FloatArray, IntArray, Problem

_SAME = 1e-10


@dataclass(frozen=True, eq=False)
class Bound:
    """An upper bound over a box, and what it is made of.

    Attributes:
        value: no solution in the box that keeps the limits is worth more.
        prices: of the resources, at least zero, float64 [R].
        solutions: int64 [n, G], in the box.
        weights: of the mixture of ``solutions`` at the end, float64 [n].
        evaluations: how often the priced problem was maximised.
    """

    value: float
    prices: FloatArray
    solutions: IntArray
    weights: FloatArray
    evaluations: int


def bound_box(
    problem: Problem, elimination: Elimination, box: Box, known: IntArray, near: IntArray, beat: float, most: int
) -> Bound:
    """Minimise D over a box whose smallest solution keeps the limits.

    Args:
        problem, elimination: of one another.
        box: where.
        known: solutions to start from, int64 [n, G]; those outside the box are left out.
        near: where the planes of a relaxed elimination are to be close.
        beat: the search ends once the bound is not above this.
        most: evaluations at most.
    """
    inside = ((known >= box.low) & (known <= box.high)).all(axis=1)
    solutions = np.unique(np.concatenate([known[inside], [box.low, box.high]]), axis=0)
    least, least_prices = np.inf, np.zeros(len(problem.limits))
    evaluations = 0
    while True:
        values, excess = problem.value(solutions), problem.excess(solutions)
        floor, prices, weights = _master(values, excess)
        if least <= max(beat, floor + _SAME * abs(floor)) or evaluations >= most:
            break
        top, solution = elimination.maximise(prices @ problem.coefficients, box, near)
        evaluations += 1
        top -= float(prices @ (problem.constants - problem.limits))
        if top < least:
            least, least_prices = top, prices
        if (solutions == solution).all(axis=1).any():
            break
        solutions = np.concatenate([solutions, solution[None]])
    return Bound(least, least_prices, solutions, weights, evaluations)


def _master(values: FloatArray, excess: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """The best mixture that keeps the limits on average: its value, the limits' prices, the weights."""
    weights = np.zeros(len(values))
    best = int(np.where((excess <= 0).all(axis=1), values, -np.inf).argmax())
    if values[best] == values.max():
        weights[best] = 1.0
        return float(values[best]), np.zeros(excess.shape[1]), weights
    if excess.shape[1] == 1:
        return _master_of_one(values, excess[:, 0])
    result = linprog(-values, A_ub=excess.T, b_ub=np.zeros(excess.shape[1]), A_eq=np.ones((1, len(values))), b_eq=[1.0])
    if result.status != 0:
        raise BudgetError("the prices of a budget's limits could not be found", why=str(result.message))
    return -float(result.fun), np.maximum(-result.ineqlin.marginals, 0.0), np.asarray(result.x)


def _master_of_one(values: FloatArray, excess: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """The same for one limit: the highest crossing of the limit by a line between a solution inside and one outside."""
    inside, outside = np.flatnonzero(excess <= 0), np.flatnonzero(excess > 0)
    slack, over = -excess[inside, None], excess[None, outside]
    share = over / (slack + over)
    mixed = share * values[inside, None] + (1 - share) * values[None, outside]
    row, column = np.unravel_index(int(mixed.argmax()), mixed.shape)
    left, right = inside[row], outside[column]
    weights = np.zeros(len(values))
    weights[left], weights[right] = share[row, column], 1 - share[row, column]
    price = (values[right] - values[left]) / (excess[right] - excess[left])
    return float(mixed[row, column]), np.array([max(float(price), 0.0)]), weights
