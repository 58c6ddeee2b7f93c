"""The cost model against real cuts and torch's own counter."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi_server.graph import CostModel, Plan, PlanError, Tracking, capture, cut, track
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Tracked = tuple[fx.GraphModule, Tracking]


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def macs_of(module: nn.Module, image: Tensor) -> int:
    # The fused attention kernel for the CPU is unknown to the counter; its plain form is not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module", params=["residual", "branches", "attention"])
def tracked(request: pytest.FixtureRequest, captured: Callable[[str], Tracked]) -> Tracked:
    return captured(request.param)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_costs_equal_those_of_the_real_cut(tracked: Tracked, images: Tensor, data: st.DataObject) -> None:
    program, tracking = tracked
    kept = {
        group.name: data.draw(st.sets(st.integers(0, group.size - 1), min_size=1)) for group in tracking.layout.groups
    }
    plan = Plan.of(tracking.layout, kept)
    model = CostModel.from_tracking(tracking)
    small = cut(program, tracking, plan)
    assert model.parameters(plan.counts) == parameters_of(small)
    assert model.macs(plan.counts) == macs_of(small, images[:1])


def test_costs_of_a_unit_are_differences(tracked: Tracked) -> None:
    _, tracking = tracked
    model = CostModel.from_tracking(tracking)
    half = {name: max(2, size // 2) for name, size in tracking.layout.sizes.items()}
    for name in half:
        less = {**half, name: half[name] - 1}
        assert model.unit_parameters(name, half) == model.parameters(half) - model.parameters(less) > 0
        assert model.unit_macs(name, half) == model.macs(half) - model.macs(less) > 0
    assert half[name] == max(2, tracking.layout.sizes[name] // 2)  # the argument is not changed


def test_groups_that_are_not_given_are_whole(tracked: Tracked) -> None:
    program, tracking = tracked
    model = CostModel.from_tracking(tracking)
    assert model.parameters({}) == parameters_of(program)
    assert model.parameters(tracking.layout.sizes) == model.parameters({})


def test_a_width_that_is_squared_counts_as_a_square(images: Tensor) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 6)
            self.inner = nn.Linear(6, 6, bias=False)
            self.leave = nn.Linear(6, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x.mean((2, 3)))
            return self.leave(x + torch.tanh(self.inner(x)))

    tracking = track(capture(Square().double(), images))
    model = CostModel.from_tracking(tracking)
    assert [model.parameters({"enter": n}) for n in (1, 2, 6)] == [n * n + 5 * n for n in (1, 2, 6)]


def test_unknown_groups_are_refused(tracked: Tracked) -> None:
    _, tracking = tracked
    with pytest.raises(PlanError, match="no groups called nothing"):
        CostModel.from_tracking(tracking).parameters({"nothing": 1})
