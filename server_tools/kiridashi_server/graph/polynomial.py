"""Sums of products of one number per group: what cuts cost, in whatever unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Shape: TypeAlias = Literal["count", "filled", "paired", "ragged", "odd"]


class Factor(NamedTuple):
    """A function of a group's unit count ``n``, through the width ``w = scale * n`` that it gives a dimension.

    ``count``: w. ``filled``: w rounded up to a multiple of ``block``; ``paired``: of twice that. ``ragged``: w if it is
    no multiple of ``block``, else 0. ``odd``: 1 if it is none, else 0.
    """

    group: str
    scale: int = 1
    shape: Shape = "count"
    block: int = 1

    def of(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The function's values at ``counts``, float64 of the same shape."""
        return shaped(counts * self.scale, self.shape, self.block)


Polynomial: TypeAlias = tuple[tuple[float, tuple[Factor, ...]], ...]
"""Terms: a coefficient, and the factors that it is multiplied by, with repetitions."""


def shaped(widths: npt.NDArray[np.int64], shape: Shape, block: int) -> npt.NDArray[np.float64]:
    """The function of :class:`Factor` at widths."""
    if shape in ("filled", "paired"):
        whole = block if shape == "filled" else 2 * block
        return np.asarray(-(-widths // whole) * whole, dtype=np.float64)
    if shape == "ragged":
        return np.where(widths % block == 0, 0, widths).astype(np.float64)
    if shape == "odd":
        return np.asarray(widths % block != 0, dtype=np.float64)
    return np.asarray(widths, dtype=np.float64)


def evaluate(terms: Polynomial, counts: Mapping[str, int]) -> float:
    """The value of a polynomial at unit counts of all its groups."""
    factors = {factor for _, names in terms for factor in names}
    known = {factor: float(factor.of(np.array(counts[factor.group]))) for factor in factors}
    total = 0.0
    for coefficient, names in terms:
        value = coefficient
        for factor in names:
            value *= known[factor]
        total += value
    return total


def weighted_sum(parts: Iterable[tuple[float, Polynomial]]) -> Polynomial:
    """The sum of polynomials, each times a number; equal products are added up, those without weight left out."""
    total: dict[tuple[Factor, ...], float] = {}
    for weight, terms in parts:
        for coefficient, names in terms:
            if weight * coefficient:
                total[names] = total.get(names, 0.0) + weight * coefficient
    return tuple((value, names) for names, value in sorted(total.items()))


def counted(terms: Iterable[tuple[float, tuple[str, ...]]]) -> Polynomial:
    """A polynomial in unit counts alone, given by the groups' names."""
    return tuple((float(coefficient), tuple(Factor(name) for name in names)) for coefficient, names in terms)
