"""Widths to choose, and what they cost: the knapsack that a budget poses, as data.

A group keeps a prefix of its units, best first, and may do so at a few widths; each width has a value. A resource is a
sum of products, with non-negative coefficients, of non-negative functions of one group's width each. The solver needs
that it never falls when a group is widened: a function that does fall is replaced by the largest one below it that does
not. A bound that is found so holds, but a solution may need more than it seems to; :func:`without_falls` leaves the
widths at which it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.graph.polynomial import Factor, Polynomial

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

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
        owners: by factor number, the number of its choice, int64 [F].
        tables: by factor number, the factor at each of its choice's widths, float64 [F][k].
        monomials: the T distinct products, each as sorted factor numbers, with repetitions.
        coefficients: float64 [R, T], of the resources divided by :attr:`scale`.
        constants: float64 [R], likewise.
        limits: float64 [R], likewise.
        membership: float64 [G, T]: 1 where the monomial has the choice as a factor.
        scale: float64 [R]: what the resource comes to with every group at its widest.
    """

    choices: tuple[Choice, ...]
    resources: tuple[Resource, ...]
    owners: IntArray
    tables: tuple[FloatArray, ...]
    monomials: tuple[tuple[int, ...], ...]
    coefficients: FloatArray
    constants: FloatArray
    limits: FloatArray
    membership: FloatArray
    scale: FloatArray
    _factors: IntArray
    _padded: FloatArray
    _values: FloatArray

    @classmethod
    def of(cls, choices: Sequence[Choice], resources: Sequence[Resource]) -> Problem:
        """Check and compile.

        Raises:
            InputError: widths or values out of order, a negative coefficient, or a group that is not among the choices.
        """
        _check(choices, resources)
        number = {choice.group: index for index, choice in enumerate(choices)}
        factors = sorted({factor for resource in resources for _, names in resource.terms for factor in names})
        owners = np.array([number[factor.group] for factor in factors], dtype=np.int64)
        tables = tuple(_rising(factor.of(choices[owner].widths)) for factor, owner in zip(factors, owners, strict=True))
        order = {factor: index for index, factor in enumerate(factors)}
        polynomials = [_by_monomial(resource, order) for resource in resources]
        monomials = tuple(sorted({names for terms in polynomials for names in terms if names}))
        coefficients = np.array([[terms.get(names, 0.0) for names in monomials] for terms in polynomials])
        coefficients = coefficients.reshape(len(resources), len(monomials))
        degree = max(map(len, monomials), default=1)
        pad = len(factors)  # an extra row of ones
        places = np.array([names + (pad,) * (degree - len(names)) for names in monomials], dtype=np.int64)
        places = places.reshape(len(monomials), degree)
        constants = np.array([terms.get((), 0.0) for terms in polynomials])
        widest = np.array([*(table[-1] for table in tables), 1.0])
        scale = coefficients @ widest[places].prod(axis=1) + constants
        scale[scale == 0] = 1.0
        limits = np.array([resource.limit for resource in resources], dtype=np.float64)
        return cls(
            tuple(choices),
            tuple(resources),
            owners,
            tables,
            monomials,
            coefficients / scale[:, None],
            constants / scale,
            limits / scale + _ROUNDING,
            _membership(monomials, owners, len(choices)),
            scale,
            places,
            _padded([*tables, np.ones(1)], 1.0),
            _padded([choice.values for choice in choices], 0.0),
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
        result: FloatArray = self._at(solutions)[..., self._factors].prod(axis=-1)
        return result

    def products_of_mean(self, solutions: IntArray, shares: FloatArray) -> FloatArray:
        """The monomials at the mean of the factors of solutions [n, G], float64 [T]."""
        result: FloatArray = (shares @ self._at(solutions))[self._factors].prod(axis=-1)
        return result

    def _at(self, solutions: IntArray) -> FloatArray:
        """The factors at solutions [..., G], and a one, float64 [..., F + 1]."""
        factors = np.ones((*solutions.shape[:-1], len(self.owners) + 1))
        factors[..., :-1] = self._padded[np.arange(len(self.owners)), solutions[..., self.owners]]
        return factors

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


def without_falls(choices: Sequence[Choice], resources: Sequence[Resource]) -> tuple[Choice, ...]:
    """The choices without the widths at which some factor is above what it is at a wider one; the widest stays."""
    factors = {factor for resource in resources for _, names in resource.terms for factor in names}
    left = []
    for choice in choices:
        tables = [factor.of(choice.widths) for factor in factors if factor.group == choice.group]
        stays = np.ones(len(choice.widths), dtype=np.bool_)
        for table in tables:
            stays &= table == _rising(table)
        left.append(Choice(choice.group, choice.widths[stays], choice.values[stays]))
    return tuple(left)


def _rising(table: FloatArray) -> FloatArray:
    """The largest table below this one that never falls."""
    return np.minimum.accumulate(table[::-1])[::-1]


def _padded(rows: Sequence[FloatArray], value: float) -> FloatArray:
    """Rows of different lengths as one array."""
    result = np.full((len(rows), max(map(len, rows), default=1)), value)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result


def _membership(monomials: Sequence[tuple[int, ...]], owners: IntArray, choices: int) -> FloatArray:
    rows = [[float(choice in owners[list(names)]) for names in monomials] for choice in range(choices)]
    return np.array(rows).reshape(choices, len(monomials))


def _by_monomial(resource: Resource, order: Mapping[Factor, int]) -> dict[tuple[int, ...], float]:
    terms: dict[tuple[int, ...], float] = {}
    for coefficient, names in resource.terms:
        key = tuple(sorted(order[name] for name in names))
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
        unknown = {factor.group for _, names in resource.terms for factor in names} - set(groups)
        if unknown:
            raise InputError(f"'{resource.name}' depends on '{min(unknown)}', which has no widths to choose from")
        if any(not 0 <= coefficient < np.inf for coefficient, _ in resource.terms) or not np.isfinite(resource.limit):
            raise InputError(
                f"'{resource.name}' has a coefficient or a limit that is out of range",
                why="coefficients are finite and at least zero, limits finite",
            )
