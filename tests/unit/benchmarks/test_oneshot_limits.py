"""Limits hold every method to the same size, and bisection finds the largest cut inside."""

import numpy as np
import pytest
from kiridashi_server.backbone import Backbone
from kiridashi_server.baselines import Target, l1_plan
from kiridashi_server.graph.plan import Plan

from benchmarks.oneshot_limits import ShareLimit, largest


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(image_size=64)


def test_a_share_is_filled_and_not_passed(backbone):
    limit = ShareLimit(backbone, 30)
    scores = {group.name: np.arange(1, group.size + 1, dtype=np.float32) for group in backbone.layout.groups}
    plan = limit.solved(scores)
    share = backbone.costs.parameters(plan.counts) / backbone.costs.parameters({})
    assert 0.29 < share <= 0.3
    assert limit.holds(plan.counts)
    assert not limit.holds({})


def test_bisection_comes_near_the_limit_from_below(backbone):
    limit = ShareLimit(backbone, 40)
    tried: list[float] = []

    def make(share: float) -> Plan:
        tried.append(share)
        return l1_plan(backbone, Target(None, 2, share, 0))

    plan = largest(limit, make)
    assert limit.holds(plan.counts)
    assert 0.39 < backbone.costs.parameters(plan.counts) / backbone.costs.parameters({}) <= 0.4
    assert tried[:3] == [0.5, 0.25, 0.375]
    assert len(tried) < 10


def test_nothing_inside_is_told(backbone):
    with pytest.raises(ValueError, match="limit '1'"):
        largest(ShareLimit(backbone, 1), lambda _: Plan.full(backbone.layout))
