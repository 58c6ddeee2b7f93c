"""What a cut costs, as a polynomial in the numbers of kept units.

A tensor's size is the product of its axes, an axis is a product or a sum of atoms, and an atom is a group's
unit count or a constant; so the parameters and the multiply-accumulate operations of any cut are polynomials
with integer coefficients, exact and quick to evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kiridashi_server.graph.dims import Dim, resolve
from kiridashi_server.graph.errors import PlanError
from kiridashi_server.graph.rules import BATCH
from kiridashi_server.graph.tracker import Tracking

Term: TypeAlias = tuple[int, tuple[str, ...]]
"""A coefficient, and the groups whose unit counts it is multiplied by, with repetitions."""

_Polynomial: TypeAlias = dict[tuple[str, ...], int]


@dataclass(frozen=True)
class CostModel:
    """Exact parameters and multiply-accumulates of cuts, from unit counts alone.

    Attributes:
        sizes: number of units of each group in the dense program; counts that are not given are these.
        parameter_terms: the polynomial of the number of parameters (buffers are not counted).
        mac_terms: that of the multiply-accumulates of convolutions, linear layers and matrix products, for one
            sample, or for the example's batch when the program was captured with a fixed one.
    """

    sizes: Mapping[str, int]
    parameter_terms: tuple[Term, ...]
    mac_terms: tuple[Term, ...]

    @classmethod
    def from_tracking(cls, tracking: Tracking) -> CostModel:
        """The cost model of the tracked program."""
        tensors = [tracking.tensors[name] for name in tracking.parameters]
        return cls(
            dict(tracking.layout.sizes),
            sum_of_products(tensors, tracking),
            sum_of_products([[*work.rest, work.inner, work.outer] for work in tracking.works], tracking),
        )

    def parameters(self, kept: Mapping[str, int]) -> int:
        """Number of parameters after a cut that keeps ``kept[group]`` units.

        Raises:
            PlanError: an unknown group.
        """
        return evaluate_terms(self.parameter_terms, self._counts(kept))

    def macs(self, kept: Mapping[str, int]) -> int:
        """Multiply-accumulates for one sample after a cut that keeps ``kept[group]`` units.

        Raises:
            PlanError: an unknown group.
        """
        return evaluate_terms(self.mac_terms, self._counts(kept))

    def unit_parameters(self, group: str, kept: Mapping[str, int]) -> int:
        """Parameters that go when, from ``kept``, one more unit of ``group`` is dropped."""
        return self._unit(self.parameter_terms, group, kept)

    def unit_macs(self, group: str, kept: Mapping[str, int]) -> int:
        """Multiply-accumulates that go when, from ``kept``, one more unit of ``group`` is dropped."""
        return self._unit(self.mac_terms, group, kept)

    def _unit(self, terms: Sequence[Term], group: str, kept: Mapping[str, int]) -> int:
        counts = self._counts({**kept, group: kept.get(group, self.sizes.get(group, 0))})
        concerned = [term for term in terms if group in term[1]]
        before = evaluate_terms(concerned, counts)
        counts[group] -= 1
        return before - evaluate_terms(concerned, counts)

    def _counts(self, kept: Mapping[str, int]) -> dict[str, int]:
        if not kept.keys() <= self.sizes.keys():
            unknown = ", ".join(sorted(kept.keys() - self.sizes.keys()))
            raise PlanError(f"the cost model has no groups called {unknown}", next_step="see Layout.table()")
        return {**self.sizes, **kept}


def evaluate_terms(terms: Iterable[Term], counts: Mapping[str, int]) -> int:
    """The value of a polynomial at unit counts of all its groups."""
    return sum(coefficient * math.prod(map(counts.__getitem__, names)) for coefficient, names in terms)


def sum_of_products(products: Iterable[Sequence[Dim]], tracking: Tracking) -> tuple[Term, ...]:
    """The sum of the products of dimensions, for one sample, as a polynomial in unit counts."""
    total: _Polynomial = {}
    for dims in products:
        polynomial: _Polynomial = {(): 1}
        for dim in dims:
            polynomial = _times(polynomial, _size(dim, tracking))
        _add(total, polynomial)
    return tuple((coefficient, names) for names, coefficient in sorted(total.items()))


def _size(dim: Dim, tracking: Tracking) -> _Polynomial:
    polynomial: _Polynomial = {(): 1}
    for atom in resolve(dim):
        if atom.pieces:
            factor: _Polynomial = {}
            for piece in atom.pieces:
                _add(factor, _size(piece, tracking))
        elif atom in tracking.names:
            factor = {(tracking.names[atom],): 1}
        else:
            factor = {(): atom.size // BATCH if atom.size % BATCH == 0 else atom.size}
        polynomial = _times(polynomial, factor)
    return polynomial


def _times(left: _Polynomial, right: _Polynomial) -> _Polynomial:
    result: _Polynomial = {}
    for names, coefficient in left.items():
        for more, factor in right.items():
            key = tuple(sorted(names + more))
            result[key] = result.get(key, 0) + coefficient * factor
    return result


def _add(total: _Polynomial, polynomial: _Polynomial) -> None:
    for names, coefficient in polynomial.items():
        total[names] = total.get(names, 0) + coefficient
