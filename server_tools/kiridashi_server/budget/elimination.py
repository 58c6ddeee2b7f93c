"""The exact maximum of value minus priced cost, by eliminating one group after the other.

With a price on every resource, the choice of widths is a discrete graphical model: each group has its values, and each
product of widths couples the groups in it. Non-serial dynamic programming (Bertelè and Brioschi 1972), also known as
bucket elimination (Dechter 1999), maximises it exactly; its largest table grows with the number of groups that are
coupled at once, which is two or three for the networks we know. Where a table would still grow too large, a product is
replaced by a plane below it (McCormick 1976): w·r >= w·l_r + l_w·r - l_w·l_r for w >= l_w and r >= l_r, or the same at
the upper ends. The result is then an upper bound of the maximum instead of the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kiridashi_server.budget.problem import FloatArray, IntArray, Problem

LARGEST_TABLE = 2**18


@dataclass(frozen=True, eq=False)
class Box:
    """Inclusive bounds of solutions, int64 [G] each."""

    low: IntArray
    high: IntArray


@dataclass(frozen=True)
class _Split:
    """A monomial that is replaced by a plane: ``variable`` and ``rest`` are told apart; all are monomial numbers."""

    monomial: int
    variable: int
    rest: int


@dataclass(frozen=True)
class _Bucket:
    """One elimination.

    Attributes:
        scope: the choice that goes, then those that its table depends on, in the order of their elimination.
        products: monomials by their factors of the choice that goes.
        messages: the earlier buckets whose result depends on it.
    """

    scope: tuple[int, ...]
    products: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    messages: tuple[int, ...]


class Elimination:
    """Maximises ``value - prices · monomials`` over boxes of solutions.

    Args:
        problem: its choices and monomials.
        largest_table: entries that a table may have.
    """

    def __init__(self, problem: Problem, largest_table: int = LARGEST_TABLE) -> None:
        self._problem = problem
        self._monomials = list(problem.monomials)
        self._splits: list[_Split] = []
        self._sizes = [len(choice.widths) for choice in problem.choices]
        order, scopes = self._order(largest_table)
        self._buckets = self._fill(order, scopes)
        self._rests = {
            (bucket.scope[0], monomial): self._outer(monomial, bucket)
            for bucket in self._buckets
            for _, monomials in bucket.products
            for monomial in monomials
        }

    @property
    def exact(self) -> bool:
        """Whether every product is taken as it is."""
        return not self._splits

    def maximise(self, prices: FloatArray, box: Box, near: IntArray) -> tuple[float, IntArray]:
        """The maximum over a box, and a solution that has it.

        Args:
            prices: at least zero, float64 [T], of the problem's monomials.
            box: what is allowed.
            near: a solution; planes are chosen to be close there.

        Returns:
            The maximum, or where the elimination is not :attr:`exact` an upper bound of it, and the solution.
        """
        prices, constant = self._relaxed(prices, box, near)
        slices = [slice(low, high + 1) for low, high in zip(box.low, box.high, strict=True)]
        tables: list[FloatArray] = []
        results: list[FloatArray] = []
        for bucket in self._buckets:
            table = self._table(bucket, prices, slices, results)
            tables.append(table)
            results.append(table.max(axis=0))
        total = sum(float(result) for result, bucket in zip(results, self._buckets, strict=True) if result.ndim == 0)
        return total - constant, self._trace(tables, box)

    def _table(self, bucket: _Bucket, prices: FloatArray, slices: list[slice], results: list[FloatArray]) -> FloatArray:
        first, *others = bucket.scope
        choice = self._problem.choices[first]
        shape = (-1,) + (1,) * len(others)
        table: FloatArray = choice.values[slices[first]].reshape(shape)
        for own, monomials in bucket.products:
            slope: FloatArray | float = 0.0
            for monomial in monomials:
                rest = self._rests[first, monomial]
                axes = tuple(
                    slices[variable] if size > 1 else slice(None)
                    for variable, size in zip(others, rest.shape, strict=True)
                )
                slope = slope + prices[monomial] * rest[axes]
            factor = np.prod([self._problem.tables[name][slices[first]] for name in own], axis=0)
            table = table - factor.reshape(shape) * slope
        for message in bucket.messages:
            table = table + _expand(results[message], self._buckets[message].scope[1:], bucket.scope)
        return np.broadcast_to(table, [slices[v].stop - slices[v].start for v in bucket.scope])

    def _trace(self, tables: list[FloatArray], box: Box) -> IntArray:
        chosen = np.zeros(len(self._sizes), dtype=np.int64)
        for bucket, table in zip(reversed(self._buckets), reversed(tables), strict=True):
            first, *others = bucket.scope
            chosen[first] = int(table[(slice(None), *(chosen[other] for other in others))].argmax())
        return chosen + box.low

    def _relaxed(self, prices: FloatArray, box: Box, near: IntArray) -> tuple[FloatArray, float]:
        """Prices of all monomials, with split ones replaced by planes, and what the planes take away at zero."""
        if self.exact:
            return prices, 0.0
        extended = np.zeros(len(self._monomials))
        extended[: len(prices)] = prices
        constant = 0.0
        for split in self._splits:
            price = extended[split.monomial]
            extended[split.monomial] = 0.0
            here = [self._product(part, near) for part in (split.variable, split.rest)]
            corners = [
                [self._product(part, corner) for part in (split.variable, split.rest)] for corner in (box.low, box.high)
            ]
            left, right = max(corners, key=lambda at: here[0] * at[1] + at[0] * here[1] - at[0] * at[1])
            extended[split.variable] += price * right
            extended[split.rest] += price * left
            constant -= price * left * right
        return extended, constant

    def _product(self, monomial: int, solution: IntArray) -> float:
        owners, tables = self._problem.owners, self._problem.tables
        return math.prod(float(tables[name][solution[owners[name]]]) for name in self._monomials[monomial])

    def _variables(self, names: tuple[int, ...]) -> set[int]:
        """The choices whose factors these are."""
        return {int(self._problem.owners[name]) for name in names}

    def _order(self, largest_table: int) -> tuple[list[int], list[set[int]]]:
        """Always eliminate what makes the smallest table; split products until every table is small enough."""
        while True:
            order, scopes = _greedy_order(map(self._variables, self._active().values()), self._sizes)
            worst = max(range(len(order)), key=lambda at: self._entries(scopes[at] | {order[at]}))
            scope = scopes[worst] | {order[worst]}
            if self._entries(scope) <= largest_table:
                return order, scopes
            self._split(scope)

    def _entries(self, scope: set[int]) -> int:
        return math.prod(self._sizes[variable] for variable in scope)

    def _active(self) -> dict[int, tuple[int, ...]]:
        """The monomials that are not split, by number."""
        gone = {split.monomial for split in self._splits}
        return {index: names for index, names in enumerate(self._monomials) if index not in gone}

    def _split(self, scope: set[int]) -> None:
        """Uncouple two choices in all products: of a table's, if it can be, the two that fewest products couple."""
        coupling: dict[tuple[int, int], list[int]] = {}
        for index, names in self._active().items():
            for pair in combinations(sorted(self._variables(names)), 2):
                coupling.setdefault(pair, []).append(index)
        (variable, _), monomials = min(
            coupling.items(), key=lambda item: (-len(scope.intersection(item[0])), len(item[1]), item[0])
        )
        for monomial in monomials:
            names = self._monomials[monomial]
            alone = tuple(name for name in names if self._problem.owners[name] == variable)
            rest = tuple(name for name in names if self._problem.owners[name] != variable)
            self._splits.append(_Split(monomial, self._number(alone), self._number(rest)))

    def _number(self, names: tuple[int, ...]) -> int:
        for index, known in self._active().items():
            if known == names:
                return index
        self._monomials.append(names)
        return len(self._monomials) - 1

    def _fill(self, order: list[int], scopes: list[set[int]]) -> list[_Bucket]:
        place = {variable: index for index, variable in enumerate(order)}
        products: list[dict[tuple[int, ...], list[int]]] = [{} for _ in order]
        for index, names in self._active().items():
            first = min(self._variables(names), key=place.__getitem__)
            own = tuple(name for name in names if self._problem.owners[name] == first)
            products[place[first]].setdefault(own, []).append(index)
        sorted_scopes = [tuple(sorted(scope, key=lambda name: place[name])) for scope in scopes]
        messages: list[list[int]] = [[] for _ in order]
        for index, scope in enumerate(sorted_scopes):
            if scope:
                messages[place[scope[0]]].append(index)
        return [
            _Bucket(
                (variable, *sorted_scopes[index]),
                tuple((own, tuple(monomials)) for own, monomials in sorted(products[index].items())),
                tuple(messages[index]),
            )
            for index, variable in enumerate(order)
        ]

    def _outer(self, monomial: int, bucket: _Bucket) -> FloatArray:
        """The monomial without the choice that goes, over the other choices of the bucket's scope."""
        names = self._monomials[monomial]
        others = bucket.scope[1:]
        result = np.ones((1,) * len(others))
        for axis, variable in enumerate(others):
            for name in names:
                if self._problem.owners[name] == variable:
                    shape = [1] * len(others)
                    shape[axis] = -1
                    result = result * self._problem.tables[name].reshape(shape)
        return result


def _greedy_order(couplings: Iterable[set[int]], sizes: list[int]) -> tuple[list[int], list[set[int]]]:
    """An elimination order, and for each choice those that its table depends on besides."""
    neighbours: list[set[int]] = [set() for _ in sizes]
    for coupled in couplings:
        for variable in coupled:
            neighbours[variable] |= coupled - {variable}
    order: list[int] = []
    scopes: list[set[int]] = []
    left = set(range(len(sizes)))
    while left:
        best = min(left, key=lambda v: (math.prod(sizes[u] for u in neighbours[v]) * sizes[v], v))
        scope = neighbours[best]
        for other in scope:
            neighbours[other] = (neighbours[other] | scope) - {other, best}
        order.append(best)
        scopes.append(scope)
        left.remove(best)
    return order, scopes


def _expand(result: FloatArray, variables: tuple[int, ...], scope: tuple[int, ...]) -> FloatArray:
    """Give a result over some of the scope's choices an axis for each of them."""
    size = dict(zip(variables, result.shape, strict=True))
    return result.reshape([size.get(variable, 1) for variable in scope])
