"""Choose the cut: the most important units that fit memory, file size and latency together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kiridashi.budget import MIB, Budget, Limit
from kiridashi.errors import BudgetError

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.budget.profile import Forecast, Profile
from kiridashi_server.compose.ladder import Ladder, build_ladder
from kiridashi_server.compose.selection import steps_for
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.layout import Layout
from kiridashi_server.graph.plan import Plan

TILTS = (0.0, 0.25, 0.5, 1.0)
_LARGEST_MARGIN = 0.10


@dataclass(frozen=True)
class Solution:
    """A plan inside the budget, as far as the profile can tell.

    Attributes:
        plan: the units that stay.
        parameters, macs: exact counts of the cut feature extractor.
        forecast: what it is expected to need on the device.
        used: forecast over limit, for every limit that the budget sets.
        binding: the limit with the largest use; ``None`` when the dense model fits.
        tilt: the trade-off between parameters and MACs that kept the most importance.
        importance: kept score over total score.
    """

    plan: Plan
    parameters: int
    macs: int
    forecast: Forecast
    used: dict[Limit, float]
    binding: Limit | None
    tilt: float
    importance: float


def plan_cut(
    layout: Layout, costs: CostModel, scores: ScoreMap, budget: Budget, profile: Profile, *, floor: float = 0.05
) -> Solution:
    """Solve a budget into a plan.

    For several tilts of the ladder between parameters and MACs, the nested family of cuts is searched by bisection for
    the largest cut whose forecast stays inside every limit, less a margin as large as the profile's own error (at
    most 10 %); the cut that keeps most of the total score wins.

    Raises:
        BudgetError: even the smallest cut breaks a limit; names the binding limit and the smallest feasible budget.
    """
    limits = _with_margin(budget, profile)

    def forecast(widths: Mapping[str, int]) -> Forecast:
        return profile.forecast(costs.parameters(widths), costs.macs(widths))

    def fits(widths: Mapping[str, int]) -> bool:
        return not _exceeded(limits, forecast(widths))

    best: tuple[float, float, Ladder, int] | None = None
    for tilt in TILTS:
        ladder = trade_off_ladder(layout, costs, scores, tilt, multiple=profile.channel_multiple, floor=floor)
        if not fits(ladder.widths(len(ladder))):
            raise _infeasible(budget, limits, forecast(ladder.widths(len(ladder))))
        steps = ladder.first_within(lambda widths: 0.0 if fits(widths) else 1.0, 0.0)
        kept = _importance(scores, ladder, steps)
        if best is None or kept > best[0]:
            best = (kept, tilt, ladder, steps)
    if best is None:
        raise BudgetError("no tilt was tried", why="TILTS is empty")
    kept, tilt, ladder, steps = best
    widths = ladder.widths(steps)
    expected = forecast(widths)
    used = {name: value / limit for name, limit, value in _pairs(budget, expected) if limit is not None}
    return Solution(
        plan=ladder_plan(layout, ladder, steps),
        parameters=costs.parameters(widths),
        macs=costs.macs(widths),
        forecast=expected,
        used=used,
        binding=_tightest(used) if steps else None,
        tilt=tilt,
        importance=kept,
    )


def trade_off_ladder(
    layout: Layout, costs: CostModel, scores: ScoreMap, tilt: float, *, multiple: int = 8, floor: float = 0.05
) -> Ladder:
    """The ladder in which a unit's score is divided by ``(its share of MACs / its share of parameters) ** tilt``.

    With a tilt of 0 units leave in the order of their score; the larger the tilt, the sooner leave units that cost
    much computation for their size.
    """
    dense = dict(layout.sizes)
    parameters, macs = costs.parameters(dense), costs.macs(dense)
    prices = {
        name: (costs.unit_macs(name, dense) / macs / (costs.unit_parameters(name, dense) / parameters)) ** tilt
        for name in scores
    }
    return build_ladder(scores, steps_for(scores, layout, multiple), floor=floor, costs=prices)


def ladder_plan(layout: Layout, ladder: Ladder, steps: int) -> Plan:
    """The plan after ``steps`` rungs; groups without scores stay whole."""
    return Plan.of(layout, {name: units.tolist() for name, units in ladder.kept(steps).items()})


def _tightest(used: Mapping[Limit, float]) -> Limit | None:
    return max(used, key=lambda name: used[name], default=None)


def _importance(scores: ScoreMap, ladder: Ladder, steps: int) -> float:
    kept = sum(float(scores[name][units].sum()) for name, units in ladder.kept(steps).items())
    return kept / sum(float(values.sum()) for values in scores.values())


def _pairs(budget: Budget, forecast: Forecast) -> tuple[tuple[Limit, float | None, float], ...]:
    return (
        ("memory", budget.memory_bytes, forecast.memory_bytes),
        ("file", budget.file_bytes, forecast.file_bytes),
        ("latency", budget.latency_p95_ms, forecast.latency_p95_ms),
    )


def _with_margin(budget: Budget, profile: Profile) -> Budget:
    def shrink(limit: float | None, error: float) -> float | None:
        return None if limit is None else limit * (1 - min(error, _LARGEST_MARGIN))

    memory = shrink(budget.memory_bytes, profile.error[0])
    file = shrink(budget.file_bytes, profile.error[1])
    return Budget(
        memory_bytes=None if memory is None else int(memory),
        file_bytes=None if file is None else int(file),
        latency_p95_ms=shrink(budget.latency_p95_ms, profile.error[2]),
    )


def _exceeded(limits: Budget, forecast: Forecast) -> list[Limit]:
    return [name for name, limit, value in _pairs(limits, forecast) if limit is not None and value > limit]


def _infeasible(budget: Budget, limits: Budget, smallest: Forecast) -> BudgetError:
    exceeded = _exceeded(limits, smallest)
    feasible = (
        f"memory={smallest.memory_bytes / MIB * 1.1:.1f}MiB,"
        f"file={smallest.file_bytes / MIB * 1.1:.2f}MiB,latency={smallest.latency_p95_ms * 1.1:.3g}ms"
    )
    return BudgetError(
        f"no cut of this backbone fits the budget {budget} on this device",
        why=f"the binding limit is {' and '.join(exceeded)}: the smallest cut is expected to need "
        f"{smallest.memory_bytes / MIB:.1f} MiB of memory, {smallest.file_bytes / MIB:.2f} MiB of file, "
        f"{smallest.latency_p95_ms:.3g} ms",
        next_step=f"ask for at least {feasible}, or choose a smaller backbone or input size",
    )
