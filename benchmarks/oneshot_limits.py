"""What holds the models of a comparison to one size: a share of the parameters, or what a device may spend.

A limit of a device is what its profile expects of a reference cut. Every method makes its own largest model that is
expected to need no more, so methods whose cuts are cheap to run may keep more parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from kiridashi.budget import Budget
from kiridashi.budget import Limit as Resource
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.profile import Profile
from kiridashi_server.budget.requirements import Requirements
from kiridashi_server.budget.solver import LARGEST_MARGIN, SMALLEST_MARGIN, plan_cut, plan_size
from kiridashi_server.graph.plan import Plan

_BISECTIONS = 8


class Limit(Protocol):
    """How large a model may be."""

    @property
    def name(self) -> str:
        """How tables call it."""
        ...

    def solved(self, scores: ScoreMap) -> Plan:
        """The best plan inside it by these scores."""
        ...

    def holds(self, counts: Mapping[str, int]) -> bool:
        """Whether a cut with these widths is inside."""
        ...


@dataclass(frozen=True, eq=False)
class ShareLimit:
    """At most ``percent`` of the backbone's parameters."""

    backbone: Backbone
    percent: int

    @property
    def name(self) -> str:
        """The number of per cent."""
        return str(self.percent)

    @cached_property
    def _parameters(self) -> int:
        return int(self.percent / 100 * self.backbone.costs.parameters({}))

    def solved(self, scores: ScoreMap) -> Plan:
        """See :class:`Limit`."""
        return plan_size(self.backbone.layout, self.backbone.costs, scores, self._parameters)

    def holds(self, counts: Mapping[str, int]) -> bool:
        """See :class:`Limit`."""
        return self.backbone.costs.parameters(counts) <= self._parameters


@dataclass(frozen=True, eq=False)
class DeviceLimit:
    """At most what the profile expects ``reference`` to need of one resource."""

    backbone: Backbone
    profile: Profile
    resource: Resource
    reference: Plan

    @property
    def name(self) -> str:
        """The resource."""
        return self.resource

    @cached_property
    def most(self) -> float:
        """Bytes or milliseconds."""
        return self._requirements.expected(self.resource, self.reference.counts)

    @cached_property
    def _requirements(self) -> Requirements:
        return Requirements.of(self.profile, self.backbone.quantities)

    def solved(self, scores: ScoreMap) -> Plan:
        """See :class:`Limit`; the solver's own margin is allowed for."""
        margin = min(max(self.profile.error[self.resource], SMALLEST_MARGIN[self.resource]), LARGEST_MARGIN)
        most = self.most / (1 - margin)
        budget = Budget(latency_p95_ms=most) if self.resource == "latency" else Budget(memory_bytes=int(most))
        return plan_cut(self.backbone.quantities, scores, budget, self.profile).plan

    def holds(self, counts: Mapping[str, int]) -> bool:
        """See :class:`Limit`."""
        return self._requirements.expected(self.resource, counts) <= self.most


def largest(limit: Limit, make: Callable[[float], Plan]) -> Plan:
    """The plan of the largest share, by bisection, that is inside the limit.

    Args:
        limit: what to keep inside of.
        make: from a share between 0 and 1 to a plan that grows with it.

    Raises:
        ValueError: none that was tried is inside.
    """
    low, high, found = 0.0, 1.0, None
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        plan = make(share)
        if limit.holds(plan.counts):
            low, found = share, plan
        else:
            high = share
    if found is None:
        raise ValueError(f"no cut inside the limit '{limit.name}' in {_BISECTIONS} bisections")
    return found
