"""The cuts whose speed is compared: for each method, plans that are expected to be about as fast as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from kiridashi.budget import Budget
from kiridashi.errors import BudgetError
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.profile import Profile
from kiridashi_server.budget.requirements import Requirements
from kiridashi_server.budget.solver import plan_cut
from kiridashi_server.compose.selection import DEFAULT_MULTIPLE, steps_for
from kiridashi_server.graph.plan import Plan
from kiridashi_server.tasks import Samples

from benchmarks.global_pruning import IMPORTANCES, global_plan, lite0_module, task_head, with_gradients

OURS, UNIFORM = "solved", "uniform"
_RATIOS = np.arange(0.02, 0.97, 0.02)
_SHARES = np.arange(0.99, 0.01, -0.01)


@dataclass(frozen=True, eq=False)
class Wanted:
    """What all methods plan for: a backbone, a device, a task's few samples, and scores of the others' bank."""

    backbone: Backbone
    profile: Profile
    samples: Samples
    classes: int
    scores: ScoreMap


def planned(wanted: Wanted, shares: Sequence[float]) -> dict[str, dict[float, Plan]]:
    """Plans by method and by the share of the dense latency that was asked for; what no cut reaches is left out.

    Ours are solved under a latency limit alone. The others get the smallest change that is forecast to be as fast: the
    largest uniform share, the smallest ratio of torch-pruning.
    """
    needs = Requirements.of(wanted.profile, wanted.backbone.quantities)

    def forecast(plan: Plan) -> float:
        return needs.expected("latency", plan.counts)

    ours = _solved(wanted, forecast(Plan.full(wanted.backbone.layout)), shares)
    limits = {share: forecast(plan) for share, plan in ours.items()}
    multiple = wanted.profile.multiple
    found = {OURS: ours}
    for step in dict.fromkeys((multiple, DEFAULT_MULTIPLE)):
        name = UNIFORM if step == multiple else f"{UNIFORM}-{step}"
        cuts = (uniform_plan(wanted.backbone, wanted.scores, float(share), step) for share in _SHARES)
        found[name] = _first_within(limits, cuts, forecast)
    head = task_head(wanted.backbone, wanted.samples, wanted.classes)
    module = with_gradients(lite0_module(wanted.backbone, head), wanted.backbone, wanted.samples)
    for method in IMPORTANCES:
        cuts = (global_plan(module, wanted.backbone, method, float(ratio), multiple=multiple) for ratio in _RATIOS)
        found[method] = _first_within(limits, cuts, forecast)
    return found


def uniform_plan(backbone: Backbone, scores: ScoreMap, share: float, multiple: int) -> Plan:
    """The same share of every group, rounded to the multiple: the units with the best scores."""
    steps = steps_for(scores, backbone.layout, multiple)
    kept = {}
    for name, values in scores.items():
        width = min(len(values), steps[name] * max(1, round(share * len(values) / steps[name])))
        kept[name] = np.argsort(-values, kind="stable")[:width].tolist()
    return Plan.of(backbone.layout, kept)


def _solved(wanted: Wanted, dense_ms: float, shares: Sequence[float]) -> dict[float, Plan]:
    found = {}
    for share in shares:
        try:
            budget = Budget(latency_p95_ms=share * dense_ms)
            found[share] = plan_cut(wanted.backbone.quantities, wanted.scores, budget, wanted.profile).plan
        except BudgetError:  # the smallest cut is slower
            continue
    return found


def _first_within(
    limits: Mapping[float, float], cuts: Iterable[Plan], forecast: Callable[[Plan], float]
) -> dict[float, Plan]:
    """For each limit the first cut inside it, of cuts from large to small."""
    found: dict[float, Plan] = {}
    for plan in cuts:
        latency = forecast(plan)
        found |= {share: plan for share, limit in limits.items() if share not in found and latency <= limit}
        if len(found) == len(limits):
            break
    return found
