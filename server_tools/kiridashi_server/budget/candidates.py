"""What a group may keep, and what that is worth: from composed scores to the choices of the knapsack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.budget.problem import Choice, IntArray
from kiridashi_server.compose.ladder import widths_of
from kiridashi_server.compose.selection import DEFAULT_FLOOR, DEFAULT_MULTIPLE, steps_for
from kiridashi_server.graph.layout import Layout
from kiridashi_server.graph.plan import Plan


@dataclass(frozen=True, eq=False)
class Candidates:
    """The nested prefixes of every group.

    Attributes:
        layout: of the groups.
        orders: units of every scored group, best first, int64 [size]; the others stay whole.
        choices: of all groups.
    """

    layout: Layout
    orders: Mapping[str, IntArray]
    choices: tuple[Choice, ...]

    def plan(self, widths: Mapping[str, int]) -> Plan:
        """The plan that keeps the best units of each group."""
        return Plan.of(
            self.layout, {name: sorted(order[: widths[name]].tolist()) for name, order in self.orders.items()}
        )

    @property
    def narrowest(self) -> dict[str, int]:
        """The smallest width of every group."""
        return {choice.group: int(choice.widths[0]) for choice in self.choices}

    @property
    def total(self) -> float:
        """What all units together are worth."""
        return sum(float(choice.values[-1]) for choice in self.choices)


def candidates(
    layout: Layout,
    scores: ScoreMap,
    *,
    multiple: int = DEFAULT_MULTIPLE,
    floor: float = DEFAULT_FLOOR,
) -> Candidates:
    """The prefixes that a cut may keep, with their values.

    A unit is worth the square of its score. The score is the root mean square of the loss's gradient at the unit's
    gate; its square is the gate's empirical Fisher information, to second order twice what the loss gains when the unit
    goes. Unlike the score, it may be added up over units.

    Args:
        layout: the backbone's.
        scores: at least zero, by group, float32 [size]; groups that are left out stay whole.
        multiple: widths are multiples of it; heads go one by one.
        floor: the least share of each group that stays.

    Raises:
        InputError: scores do not fit the layout, are below zero or all zero, or multiple or floor is out of range.
    """
    steps = steps_for(scores, layout, multiple)
    negative = [name for name, values in scores.items() if values.min() < 0]
    if negative:
        raise InputError(f"the scores of '{negative[0]}' are below zero", why="no unit is worth less than nothing")
    if not any(values.any() for values in scores.values()):
        raise InputError("all scores are zero", next_step="learn them again: kiridashi bank learn")
    orders, choices = {}, []
    for name, size in layout.sizes.items():
        if name in scores:
            order = np.argsort(-scores[name], kind="stable").astype(np.int64)
            widths = widths_of(size, steps[name], floor)
            worth = (scores[name].astype(np.float64)[order] ** 2).cumsum()
            orders[name] = order
            choices.append(Choice(name, widths, worth[widths - 1]))
        else:
            choices.append(Choice(name, np.array([size], dtype=np.int64), np.zeros(1)))
    return Candidates(layout, orders, tuple(choices))
