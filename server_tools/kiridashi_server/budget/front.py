"""The whole front of value against one limit: what every size can keep, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kiridashi.errors import InputError

from kiridashi_server.budget.knapsack import solve
from kiridashi_server.budget.problem import Choice, Resource
from kiridashi_server.graph.polynomial import Polynomial, evaluate

DEFAULT_POINTS = 40
_EVALUATIONS = 100


@dataclass(frozen=True, eq=False)
class FrontPoint:
    """One size on the front.

    Attributes:
        widths: by group.
        cost: what they need, in the unit of the limit.
        value: what they are worth.
        bound: nothing that needs no more is worth more.
    """

    widths: dict[str, int]
    cost: float
    value: float
    bound: float


def front(
    choices: Sequence[Choice], needs: Sequence[Polynomial], *, points: int = DEFAULT_POINTS
) -> tuple[FrontPoint, ...]:
    """Solve for limits from the smallest cut to the whole model, in equal ratios.

    Args:
        choices: the groups.
        needs: the cost; where there are several, the largest of them counts.
        points: limits to solve for, at least 2. Limits that give the same widths give one point.

    Returns:
        Points of rising cost and value.

    Raises:
        InputError: fewer than two points, or see :func:`.knapsack.solve`.
    """
    if points < 2 or not needs:
        raise InputError(f"a front has at least two points and one cost, got {points} and {len(needs)}")
    low, high = (
        max(evaluate(terms, {choice.group: int(choice.widths[end]) for choice in choices}) for terms in needs)
        for end in (0, -1)
    )
    found: list[FrontPoint] = []
    for limit in np.geomspace(max(low, 1e-12 * high), high, points) if high else [0.0]:
        limits = [Resource("size", terms, max(float(limit), low) * (1 + 1e-9)) for terms in needs]
        optimum = solve(choices, limits, evaluations=_EVALUATIONS)
        if optimum is not None and (not found or optimum.value > found[-1].value):
            cost = max(evaluate(terms, optimum.widths) for terms in needs)
            found.append(FrontPoint(optimum.widths, cost, optimum.value, optimum.bound))
    return tuple(found)
