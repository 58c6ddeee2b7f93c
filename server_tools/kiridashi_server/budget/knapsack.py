"""The most valuable widths that keep every limit, with a bound that says how far from the best they can be.

Branch and bound over boxes of widths. A box's bound is the Lagrangian one (:mod:`.dual`), for which the priced problem
is solved exactly (:mod:`.elimination`); its solutions, widened and exchanged (:mod:`.improvement`), are the candidates.
A box is split at the group whose products the relaxation takes most wrongly. When no box is left, the best candidate is
optimal; when the allowed evaluations are used up before, the largest bound that is left states the gap.

Where a factor falls with the width, the search sees less than is needed (:mod:`.problem`). What it finds is then
checked, and if it breaks a limit, searched for once more among the widths at which nothing falls.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kiridashi_server.budget.dual import Bound, bound_box
from kiridashi_server.budget.elimination import LARGEST_TABLE, Box, Elimination
from kiridashi_server.budget.improvement import exchanged, widened
from kiridashi_server.budget.problem import Choice, FloatArray, IntArray, Problem, Resource, without_falls
from kiridashi_server.graph.polynomial import evaluate

DEFAULT_EVALUATIONS = 400
DEFAULT_TOLERANCE = 1e-4
_EVALUATIONS_A_BOX = 40
_PROMISING = 0.99
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Optimum:
    """The widths found.

    Attributes:
        widths: by group.
        value: what they are worth.
        bound: no widths that keep the limits are worth more.
        gap: ``(bound - value) / value``; infinite where only the bound is above zero.
        prices: by resource, in order: value that one more unit of the limit would add, as the relaxation sees it.
        binding: names of the resources with a price; of the fullest one where all that fits is taken and no price is
            left; empty when every group is at its widest.
    """

    widths: dict[str, int]
    value: float
    bound: float
    gap: float
    prices: tuple[float, ...]
    binding: tuple[str, ...]


def solve(
    choices: Sequence[Choice],
    resources: Sequence[Resource],
    *,
    evaluations: int = DEFAULT_EVALUATIONS,
    tolerance: float = DEFAULT_TOLERANCE,
    largest_table: int = LARGEST_TABLE,
) -> Optimum | None:
    """Choose a width for every group.

    Args:
        choices: the groups.
        resources: the limits.
        evaluations: how many priced problems may be solved; time grows with them.
        tolerance: relative gap that is good enough.
        largest_table: entries of a table of the elimination; above, products are relaxed.

    Returns:
        The widths, the same for the same arguments, inside every limit; ``None`` if neither the smallest widths keep
        the limits, nor any at which no factor falls.

    Raises:
        InputError: widths or values out of order, a coefficient below zero, or a resource of unknown groups.
    """
    found = _search(choices, resources, evaluations, tolerance, largest_table)
    if found is None or _keeps(resources, found.widths):
        return found
    smallest = [Choice(choice.group, choice.widths[:1], choice.values[:1]) for choice in choices]
    for allowed in (without_falls(choices, resources), smallest):
        inside = _search(allowed, resources, evaluations, tolerance, largest_table)
        if inside is not None:
            gap = _gap(inside.value, found.bound)
            return replace(found, widths=inside.widths, value=inside.value, gap=gap)
    return None


def _keeps(resources: Sequence[Resource], widths: dict[str, int]) -> bool:
    """Whether widths keep every limit as the terms say, and not only as the search sees them."""
    return all(evaluate(resource.terms, widths) <= resource.limit * (1 + _ROUNDING) for resource in resources)


def _search(
    choices: Sequence[Choice], resources: Sequence[Resource], evaluations: int, tolerance: float, largest_table: int
) -> Optimum | None:
    """The best widths where every factor is replaced by one that never falls; the bound holds for the real ones too."""
    problem = Problem.of(choices, resources)
    if not problem.fits(problem.narrowest):
        return None
    if problem.fits(problem.widest):
        return _optimum(problem, problem.widest, float(problem.value(problem.widest)), np.zeros(len(problem.limits)))
    search = _Search(problem, Elimination(problem, largest_table), tolerance)
    bound = search.run(evaluations)
    return _optimum(problem, search.best, bound, search.prices)


class _Search:
    """The state of one search: the best solution so far, the boxes that are open, and all solutions met."""

    def __init__(self, problem: Problem, elimination: Elimination, tolerance: float) -> None:
        self._problem = problem
        self._elimination = elimination
        self._tolerance = tolerance
        self._open: list[tuple[float, int, Box, Bound]] = []
        self._known = np.stack([problem.narrowest, problem.widest])
        self._left = 0
        self._made = 0
        self._dropped = -np.inf
        self.best = problem.narrowest
        self.prices = np.zeros(len(problem.limits))

    def run(self, evaluations: int) -> float:
        """Search, and return the bound that is left."""
        self._left = evaluations
        root = self._add(Box(self._problem.narrowest, self._problem.widest), np.inf)
        if root is not None:
            self.prices = root.prices
            self.best = exchanged(self._problem, self.best, self.prices)
        while self._open and self._left > 0 and -self._open[0][0] > self._enough():
            _, _, box, bound = heapq.heappop(self._open)
            for part in self._split(box, bound):
                self._add(part, bound.value)
        left = -self._open[0][0] if self._open else -np.inf
        return max(left, self._dropped, float(self._problem.value(self.best)))

    def _enough(self) -> float:
        value = float(self._problem.value(self.best))
        return value + self._tolerance * abs(value)

    def _add(self, box: Box, parent: float) -> Bound | None:
        """Bound a box, and keep it for splitting if something better may be in it."""
        if not self._problem.fits(box.low):
            return None
        box = Box(box.low, self._tightened(box))
        most = max(1, min(self._left, _EVALUATIONS_A_BOX))
        bound = bound_box(self._problem, self._elimination, box, self._known, self.best, self._enough(), most)
        self._left -= bound.evaluations
        self._known = np.unique(np.concatenate([self._known, bound.solutions]), axis=0)
        self._try(bound)
        value = min(bound.value, parent)
        if value <= self._enough() or (box.low == box.high).all():
            self._dropped = max(self._dropped, value)
        else:
            self._made += 1
            heapq.heappush(self._open, (-value, self._made, box, bound))
        return bound

    def _try(self, bound: Bound) -> None:
        fitting = bound.solutions[self._problem.fits(bound.solutions)]
        best = fitting[int(self._problem.value(fitting).argmax())]
        found = widened(self._problem, best, bound.prices)
        if self._problem.value(found) > _PROMISING * self._problem.value(self.best):
            found = exchanged(self._problem, found, bound.prices)
        if self._problem.value(found) > self._problem.value(self.best):
            self.best = found

    def _tightened(self, box: Box) -> IntArray:
        """The upper ends that are left when every group is tried with all others at their lower ends."""
        high = box.high.copy()
        alone = box.low + np.diag(high - box.low)
        for group in np.flatnonzero(~self._problem.fits(alone)):
            tried = np.repeat(box.low[None], high[group] - box.low[group] + 1, axis=0)
            tried[:, group] = np.arange(box.low[group], high[group] + 1)
            high[group] = tried[self._problem.fits(tried), group].max()
        return high

    def _split(self, box: Box, bound: Bound) -> tuple[Box, Box]:
        group, at = self._where(box, bound)
        lower, upper = box.high.copy(), box.low.copy()
        lower[group], upper[group] = at, at + 1
        return Box(box.low, lower), Box(upper, box.high)

    def _where(self, box: Box, bound: Bound) -> tuple[int, int]:
        """The group whose products differ most, in price, between the bound's mixture and its mean; and its mean."""
        problem, used = self._problem, bound.weights > 0
        mixed, share = bound.solutions[used], bound.weights[used]
        differs = np.ptp(mixed, axis=0) > 0
        if not differs.any():
            group = int((box.high - box.low).argmax())
            return group, int(box.low[group] + box.high[group]) // 2
        wrong = np.abs(share @ problem.products(mixed) - problem.products_of_mean(mixed, share))
        priced = wrong * (bound.prices @ problem.coefficients)
        blame = problem.membership @ priced + 1e-12 * np.ptp(mixed, axis=0)
        group = int(np.where(differs, blame, -1.0).argmax())
        mean = int(np.floor(share @ mixed[:, group] + 1e-9))
        return group, min(max(mean, int(mixed[:, group].min())), int(mixed[:, group].max()) - 1)


def _optimum(problem: Problem, solution: IntArray, bound: float, prices: FloatArray) -> Optimum:
    value = float(problem.value(solution))
    names = [resource.name for resource, price in zip(problem.resources, prices, strict=True) if price > 0]
    if not names and (solution < problem.widest).any():
        names = [problem.resources[int(problem.excess(solution).argmax())].name]
    return Optimum(
        widths=problem.widths(solution),
        value=value,
        bound=bound,
        gap=_gap(value, bound),
        prices=tuple((prices / problem.scale).tolist()),
        binding=tuple(dict.fromkeys(names)),
    )


def _gap(value: float, bound: float) -> float:
    if value > 0:
        return (bound - value) / value
    return np.inf if bound > value else 0.0
