"""Widths to choose, and what they cost: the knapsack that a budget poses, as data.

A group keeps a prefix of its units, best first, and may do so at a few widths; each width has a value. A resource is a
polynomial in the widths with non-negative coefficients, so that it never falls when a group is widened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

Polynomial: TypeAlias = tuple[tuple[float, tuple[str, ...]], ...]
"""Terms: a coefficient, and the groups whose widths it is multiplied by, with repetitions."""


_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Choice:
    """The widths that one group may take.

    Attributes:
        group: its name.
        widths: ascending, above zero, int64 [k].
        values: what keeping that many units is worth, never falling, float64 [k].
    """

    group: str
    widths: IntArray
    values: FloatArray


@dataclass(frozen=True)
class Resource:
    """Something that is limited: ``terms`` at the chosen widths is at most ``limit``; names may be shared."""

    name: str
    terms: Polynomial
    limit: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Choices and resources as arrays; a solution is an index into each choice's widths.

    Attributes:
        choices: G of them.
        resources: R of them.
        monomials: the T distinct products of widths, each as sorted choice numbers, with repetitions.
        coefficients: float64 [R, T], of the resources divided by :attr:`scale`.
        constants: float64 [R], likewise.
        limits: float64 [R], likewise.
        membership: float64 [G, T]: 1 where the monomial has the choice as a factor.
        scale: float64 [R]: what the resource comes to with every group at its widest.
    """

    choices: tuple[Choice, ...]
    resources: tuple[Resource, ...]
    monomials: tuple[tuple[int, ...], ...]
    coefficients: FloatArray
    constants: FloatArray
    limits: FloatArray
    membership: FloatArray
    scale: FloatArray
    _factors: IntArray
    _widths: FloatArray
    _values: FloatArray

    @classmethod
    def of(cls, choices: Sequence[Choice], resources: Sequence[Resource]) -> Problem:
        """Check and compile.

        Raises:
            InputError: widths or values out of order, a negative coefficient, or a group that is not among the choices.
        """
        _check(choices, resources)
        number = {choice.group: index for index, choice in enumerate(choices)}
        polynomials = [_by_monomial(resource, number) for resource in resources]
        monomials = tuple(sorted({names for terms in polynomials for names in terms if names}))
        coefficients = np.array([[terms.get(names, 0.0) for names in monomials] for terms in polynomials])
        coefficients = coefficients.reshape(len(resources), len(monomials))
        degree = max(map(len, monomials), default=1)
        longest = max(len(choice.widths) for choice in choices)
        pad = len(choices)  # an extra column of ones
        factors = np.array([names + (pad,) * (degree - len(names)) for names in monomials], dtype=np.int64)
        widths, values = np.ones((pad + 1, longest)), np.zeros((pad + 1, longest))
        for row, choice in enumerate(choices):
            widths[row, : len(choice.widths)] = choice.widths
            values[row, : len(choice.widths)] = choice.values
        constants = np.array([terms.get((), 0.0) for terms in polynomials])
        widest = np.array([*(choice.widths[-1] for choice in choices), 1], dtype=np.float64)
        factors = factors.reshape(len(monomials), degree)
        scale = coefficients @ widest[factors].prod(axis=1) + constants
        scale[scale == 0] = 1.0
        limits = np.array([resource.limit for resource in resources], dtype=np.float64)
        return cls(
            tuple(choices),
            tuple(resources),
            monomials,
            coefficients / scale[:, None],
            constants / scale,
            limits / scale + _ROUNDING,
            _membership(monomials, len(choices)),
            scale,
            factors,
            widths,
            values,
        )

    @property
    def narrowest(self) -> IntArray:
        """The solution with every group at its smallest width."""
        return np.zeros(len(self.choices), dtype=np.int64)

    @property
    def widest(self) -> IntArray:
        """The solution with every group at its largest width."""
        return np.array([len(choice.widths) - 1 for choice in self.choices], dtype=np.int64)

    def value(self, solutions: IntArray) -> FloatArray:
        """Values of solutions [..., G]."""
        total: FloatArray = self._values[np.arange(len(self.choices)), solutions].sum(axis=-1)
        return total

    def products(self, solutions: IntArray) -> FloatArray:
        """The monomials at solutions [..., G], float64 [..., T]."""
        widths = np.ones((*solutions.shape[:-1], len(self.choices) + 1))
        widths[..., :-1] = self._widths[np.arange(len(self.choices)), solutions]
        result: FloatArray = widths[..., self._factors].prod(axis=-1)
        return result

    def products_of_mean(self, solutions: IntArray, shares: FloatArray) -> FloatArray:
        """The monomials at the mean of the widths of solutions [n, G], float64 [T]."""
        widths = np.ones(len(self.choices) + 1)
        widths[:-1] = shares @ self._widths[np.arange(len(self.choices)), solutions]
        result: FloatArray = widths[self._factors].prod(axis=-1)
        return result

    def excess(self, solutions: IntArray) -> FloatArray:
        """How far solutions [..., G] are over each limit, in shares of :attr:`scale`, float64 [..., R]."""
        over: FloatArray = self.products(solutions) @ self.coefficients.T + (self.constants - self.limits)
        return over

    def fits(self, solutions: IntArray) -> npt.NDArray[np.bool_]:
        """Which solutions [..., G] keep every limit."""
        inside = self.excess(solutions) <= 0
        return np.asarray(inside.all(axis=-1))

    def widths(self, solution: IntArray) -> dict[str, int]:
        """The width of each group."""
        return {choice.group: int(choice.widths[index]) for choice, index in zip(self.choices, solution, strict=True)}


def evaluate(terms: Polynomial, widths: Mapping[str, int]) -> float:
    """A polynomial at the widths of its groups."""
    return float(sum(coefficient * math.prod(map(widths.__getitem__, names)) for coefficient, names in terms))


def _membership(monomials: Sequence[tuple[int, ...]], choices: int) -> FloatArray:
    return np.array([[float(choice in names) for names in monomials] for choice in range(choices)]).reshape(
        choices, len(monomials)
    )


def _by_monomial(resource: Resource, number: dict[str, int]) -> dict[tuple[int, ...], float]:
    terms: dict[tuple[int, ...], float] = {}
    for coefficient, names in resource.terms:
        key = tuple(sorted(number[name] for name in names))
        terms[key] = terms.get(key, 0.0) + coefficient
    return terms


def _check(choices: Sequence[Choice], resources: Sequence[Resource]) -> None:
    groups = [choice.group for choice in choices]
    if not choices or len(set(groups)) < len(groups):
        raise InputError("a budget needs groups to choose widths for, each given once")
    for choice in choices:
        widths, values = choice.widths, choice.values
        if len(widths) == 0 or len(widths) != len(values) or widths[0] < 1 or not np.isfinite(values).all():
            raise InputError(f"the widths of '{choice.group}' must be above zero, each with a finite value")
        if (np.diff(widths) <= 0).any() or (np.diff(values) < 0).any():
            raise InputError(f"the widths of '{choice.group}' must rise, and their values must not fall")
    for resource in resources:
        unknown = {name for _, names in resource.terms for name in names} - set(groups)
        if unknown:
            raise InputError(f"'{resource.name}' depends on '{min(unknown)}', which has no widths to choose from")
        if any(not 0 <= coefficient < np.inf for coefficient, _ in resource.terms) or not np.isfinite(resource.limit):
            raise InputError(
                f"'{resource.name}' has a coefficient or a limit that is out of range",
                why="coefficients are finite and at least zero, limits finite",
            )
