"""A plan keeps what was asked for: never more parameters, and not a step fewer than necessary."""

import numpy as np
import pytest
from kiridashi.errors import BudgetError, InputError
from kiridashi_server.compose.ladder import build_ladder
from kiridashi_server.compose.selection import select, steps_for
from kiridashi_server.graph.cost import CostModel


@pytest.fixture
def scores(backbone):
    generator = np.random.default_rng(0)
    return {name: generator.random(size).astype(np.float32) for name, size in backbone.layout.sizes.items()}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_the_largest_cut_within_the_share(backbone, scores, share):
    costs = CostModel.from_tracking(backbone.tracking)
    plan = select(scores, backbone.layout, costs, share, multiple=4)
    limit = share * costs.parameters({})
    assert costs.parameters(plan.counts) <= limit
    ladder = build_ladder(scores, steps_for(scores, backbone.layout, 4))
    steps = next(n for n in range(len(ladder) + 1) if ladder.widths(n) == plan.counts)
    assert costs.parameters(ladder.widths(steps - 1)) > limit
    assert all(count % 4 == 0 for count in plan.counts.values())


def test_a_count_and_its_share_give_the_same_plan(backbone, scores):
    costs = CostModel.from_tracking(backbone.tracking)
    half = costs.parameters({}) // 2
    assert select(scores, backbone.layout, costs, half) == select(
        scores, backbone.layout, costs, half / costs.parameters({})
    )


def test_smaller_plans_are_parts_of_larger_ones(backbone, scores):
    costs = CostModel.from_tracking(backbone.tracking)
    large, small = (select(scores, backbone.layout, costs, share) for share in (0.6, 0.3))
    assert all(set(small.kept[name]) <= set(large.kept[name]) for name in large.kept)


def test_groups_without_scores_stay_whole(backbone, scores):
    costs = CostModel.from_tracking(backbone.tracking)
    name = min(scores)
    some = {key: values for key, values in scores.items() if key != name}
    plan = select(some, backbone.layout, costs, 0.6)
    assert plan.counts[name] == backbone.layout.sizes[name]


def test_what_cannot_be_is_refused(backbone, scores):
    costs = CostModel.from_tracking(backbone.tracking)
    with pytest.raises(BudgetError, match="no cut costs at most"):
        select(scores, backbone.layout, costs, 1)
    with pytest.raises(InputError, match="share"):
        select(scores, backbone.layout, costs, 1.5)
    with pytest.raises(InputError, match="multiple"):
        select(scores, backbone.layout, costs, 0.5, multiple=0)
    with pytest.raises(InputError, match="does not have"):
        select({**scores, "elsewhere": np.ones(3, np.float32)}, backbone.layout, costs, 0.5)
    name = min(scores)
    with pytest.raises(InputError, match="shape"):
        select({**scores, name: scores[name][:-1]}, backbone.layout, costs, 0.5)
