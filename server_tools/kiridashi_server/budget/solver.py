"""Choose the cut: the most important units that fit memory, file size and latency together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from kiridashi.budget import MIB, Budget, Limit
from kiridashi.errors import BudgetError

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.budget.candidates import candidates
from kiridashi_server.budget.knapsack import solve
from kiridashi_server.budget.problem import Resource
from kiridashi_server.budget.profile import Forecast, Profile
from kiridashi_server.budget.requirements import LIMITS, Requirements
from kiridashi_server.compose.selection import DEFAULT_FLOOR, DEFAULT_MULTIPLE
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.layout import Layout
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.polynomial import counted
from kiridashi_server.graph.quantities import Quantities

LARGEST_MARGIN = 0.10
SMALLEST_MARGIN: Mapping[Limit, float] = {"memory": 0.03, "file": 0.0, "latency": 0.04}
"""However well a profile fits, two measurements of one model differ by so much."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Solution:
    """A plan inside the budget, as far as the profile can tell.

    Attributes:
        plan: the units that stay.
        parameters, macs: exact counts of the cut feature extractor.
        forecast: what it is expected to need on the device.
        used: forecast over limit, for every limit that the budget sets.
        binding: the limit with the largest use; ``None`` when the dense model fits.
        importance: what the kept units are worth, over what all are worth.
        gap: no plan inside the budget keeps more than ``1 + gap`` times of that.
    """

    plan: Plan
    parameters: int
    macs: int
    forecast: Forecast
    used: dict[Limit, float]
    binding: Limit | None
    importance: float
    gap: float


def plan_cut(
    quantities: Quantities, scores: ScoreMap, budget: Budget, profile: Profile, *, floor: float = DEFAULT_FLOOR
) -> Solution:
    """Solve a budget into a plan.

    The most valuable prefixes of all groups (:func:`.candidates.candidates`) whose forecast stays inside every limit,
    less a margin, with a bound on what a better plan could keep (:func:`.knapsack.solve`). The margin is the profile's
    own error, at most 10 %, and at least what two measurements of one model differ by.

    Raises:
        BudgetError: even the smallest cut breaks a limit; names the binding limits and the nearest feasible budget.
        InputError: the profile is of another backbone, or see :func:`.candidates.candidates`.
    """
    layout, costs = quantities.layout, quantities.costs
    options = candidates(layout, scores, multiple=profile.multiple, floor=floor)
    requirements, limits = Requirements.of(profile, quantities), _limits(budget)
    margins = {name: 1 - min(max(profile.error[name], SMALLEST_MARGIN[name]), LARGEST_MARGIN) for name in LIMITS}
    expected = requirements.expected

    narrowed = {name: limit * margins[name] * (1 - _ROUNDING) for name, limit in limits.items()}
    optimum = solve(
        options.choices,
        [Resource(name, terms, limit) for name, limit in narrowed.items() for terms in requirements.needs[name]],
    )
    if optimum is None:
        smallest = {name: expected(name, options.narrowest) for name in limits}
        short = {name: need / margins[name] for name, need in smallest.items() if need > narrowed[name]}
        raise _infeasible(budget, short)
    widths = optimum.widths
    filled = {name: expected(name, widths) / limit for name, limit in narrowed.items()}
    return Solution(
        plan=options.plan(widths),
        parameters=costs.parameters(widths),
        macs=costs.macs(widths),
        forecast=requirements.forecast(widths),
        used={name: expected(name, widths) / limit for name, limit in limits.items()},
        binding=_fullest(filled) if optimum.binding else None,
        importance=optimum.value / options.total,
        gap=optimum.gap,
    )


def _fullest(filled: Mapping[Limit, float]) -> Limit:
    return max(filled, key=lambda name: filled[name])


def plan_size(
    layout: Layout,
    costs: CostModel,
    scores: ScoreMap,
    parameters: int,
    *,
    multiple: int = DEFAULT_MULTIPLE,
    floor: float = DEFAULT_FLOOR,
) -> Plan:
    """The most valuable prefixes of all groups with at most ``parameters`` parameters in all.

    Raises:
        BudgetError: the smallest cut has more.
        InputError: see :func:`.candidates.candidates`.
    """
    options = candidates(layout, scores, multiple=multiple, floor=floor)
    optimum = solve(options.choices, [Resource("parameters", counted(costs.parameter_terms), parameters)])
    if optimum is None:
        raise BudgetError(
            f"no cut has at most {parameters:,} parameters",
            why=f"the smallest one, with every group at its floor, has {costs.parameters(options.narrowest):,}",
            next_step="allow more, or lower the floor",
        )
    return options.plan(optimum.widths)


def _limits(budget: Budget) -> dict[Limit, float]:
    limits: dict[Limit, float | None] = {
        "memory": budget.memory_bytes,
        "file": budget.file_bytes,
        "latency": budget.latency_p95_ms,
    }
    return {name: float(limit) for name, limit in limits.items() if limit is not None}


def _infeasible(budget: Budget, short: Mapping[Limit, float]) -> BudgetError:
    """The error for a budget in which some limits are below ``short``, what they would have to be.

    The cut with all groups at their floors keeps every other limit, so raising these alone is enough.
    """
    texts = {name: _exactly(name, limit) for name, limit in _limits(budget).items()}
    raised = {name: _at_least(name, need) for name, need in short.items()}
    nearest = ",".join(f"{name}={text}" for name, text in {**texts, **raised}.items())
    needed = " and ".join(f"{name}={text}" for name, text in raised.items())
    return BudgetError(
        f"no cut of this backbone fits the budget {budget} on this device",
        why=f"the binding limit is {' and '.join(short)}: with every group at its floor the cut still needs {needed}",
        next_step=f"ask for at least {nearest}, or choose a smaller backbone or input size",
    )


def _exactly(name: Limit, limit: float) -> str:
    """A limit as :meth:`Budget.parse` reads it back."""
    if name == "latency":
        return f"{np.format_float_positional(limit, trim='-')}ms"
    mebibytes = f"{limit / MIB:.2f}"
    return f"{mebibytes}MiB" if int(float(mebibytes) * MIB) == limit else f"{int(limit)}B"


def _at_least(name: Limit, need: float) -> str:
    """The need rounded up to three digits or more, as :meth:`Budget.parse` reads it."""
    if name == "latency":
        digits = max(0, 2 - math.floor(math.log10(need)))
        return f"{math.ceil(need * 10**digits) / 10**digits:.{digits}f}ms"
    return f"{math.ceil((need + 1) / MIB * 1000) / 1000:.3f}MiB"
