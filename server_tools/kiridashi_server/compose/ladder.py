"""Nested prefixes: the order in which units leave, one rung at a time.

Every group orders its units by score and gives them up in steps of the channel multiple. All steps of all
groups, sorted by value, are the rungs of one ladder. Standing on rung ``n`` means that the first ``n`` steps
have been taken, so what is kept on a higher rung is always part of what is kept on a lower one. Any cost that
falls when units leave (parameters, bytes, milliseconds) can therefore be met by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from kiridashi.errors import BudgetError, InputError

from kiridashi_server.amp.scores import ScoreMap, check_scores

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rung:
    """One step: ``group`` goes down to ``width`` units; ``value`` is the mean score of the units that leave."""

    group: str
    width: int
    value: float


@dataclass(frozen=True, eq=False)
class Ladder:
    """All steps from the dense model to the smallest one.

    Attributes:
        orders: units of every scored group, best first, int64 [size].
        rungs: the steps, the first to be taken first.
    """

    orders: Mapping[str, IntArray]
    rungs: tuple[Rung, ...]

    def __len__(self) -> int:
        return len(self.rungs)

    def widths(self, steps: int) -> dict[str, int]:
        """Units that each scored group keeps after the first ``steps`` rungs."""
        widths = {name: len(order) for name, order in self.orders.items()}
        for rung in self.rungs[:steps]:
            widths[rung.group] = rung.width
        return widths

    def kept(self, steps: int) -> dict[str, IntArray]:
        """Kept units by group after the first ``steps`` rungs, ascending; scored groups only."""
        return {name: np.sort(self.orders[name][:width]) for name, width in self.widths(steps).items()}

    def first_within(self, cost: Callable[[Mapping[str, int]], float], limit: float) -> int:
        """The fewest steps after which ``cost(widths)`` is at most ``limit``.

        Args:
            cost: of the widths of the scored groups; must not rise when a width falls.
            limit: in the unit of ``cost``.

        Raises:
            BudgetError: even the last rung costs more; the message has the smallest cost.
        """
        smallest = cost(self.widths(len(self)))
        if smallest > limit:
            raise BudgetError(
                f"no cut costs at most {limit:,.0f}",
                why=f"the smallest one, with every group at its floor, costs {smallest:,.0f}",
                next_step=f"allow at least {math.ceil(smallest):,}, or lower the floor",
            )
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if cost(self.widths(middle)) <= limit:
                high = middle
            else:
                low = middle + 1
        return low


def build_ladder(scores: ScoreMap, multiples: Mapping[str, int], *, floor: float = 0.05) -> Ladder:
    """Order all steps by value.

    Args:
        scores: by group, float32 [size]. Groups that are left out stay whole.
        multiples: by group, the step in units; widths are multiples of it (the dense width aside).
        floor: the least share of a group's units that stays; at least one step stays in any case.

    Returns:
        A ladder that depends on the arguments only: equal scores leave in the order of group name, then unit.
    """
    check_scores(scores, {name: len(values) for name, values in scores.items()})
    orders = {name: np.argsort(-values, kind="stable").astype(np.int64) for name, values in scores.items()}
    keyed: list[tuple[float, str, int]] = []
    for name, order in orders.items():
        ranked = scores[name].astype(np.float64)[order]
        upper = len(order)
        for width in widths_of(len(order), multiples[name], floor)[-2::-1].tolist():
            keyed.append((float(ranked[width:upper].mean()), name, width))
            upper = width
    keyed.sort(key=lambda step: (step[0], step[1], -step[2]))
    return Ladder(orders, tuple(Rung(name, width, value) for value, name, width in keyed))


def widths_of(size: int, multiple: int, floor: float) -> IntArray:
    """The widths that a group may take, ascending: all of it, and multiples from the floor up, int64 [k].

    Raises:
        InputError: the floor is not a share.
    """
    if not 0 <= floor <= 1:
        raise InputError(f"the floor is a share between 0 and 1, got {floor}")
    lowest = max(1, math.ceil(floor * size / multiple)) * multiple
    return np.array([*range(lowest, size, multiple), size], dtype=np.int64)
