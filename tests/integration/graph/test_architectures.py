"""On real architectures a cut equals the masked dense model, and its cost is the one predicted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kiridashi_server.graph import CostModel, Plan, capture, cut, fold_batch_norm, masked, track
from torch import Tensor, nn

Make = Callable[[str], nn.Module]

GROUPS = {
    "resnet-basic": 9,
    "resnet-bottleneck": 15,
    "mobilenet-v2": 25,
    "vit-fused": 8,  # for each block: heads, query channels (the scale is a constant), value channels, hidden nodes
    "vit-plain": 8,
    "efficientnet": 22,
    "mobilevit": 58,
    "swin": 12,
    "regnet": 20,  # of every grouped convolution: groups, and its channels inside a group
    "convnext-v2": 5,  # hidden nodes, through the response normalisation
}


@pytest.mark.parametrize("name", GROUPS)
def test_half_of_every_group_can_go(name: str, make_architecture: Make, images: Tensor) -> None:
    program = capture(make_architecture(name), images)
    tracking = track(program)
    assert len(tracking.layout.groups) == GROUPS[name]
    rng = np.random.default_rng(0)
    plan = Plan.of(
        tracking.layout,
        {
            group.name: rng.choice(group.size, max(1, group.size // 2), replace=False)
            for group in tracking.layout.groups
        },
    )
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    with torch.no_grad():
        for batch in (images, images[:1]):
            torch.testing.assert_close(small(batch), dense(batch), rtol=0, atol=1e-12)
        assert (dense(images) - program(images)).abs().max() > 1e-3
        torch.testing.assert_close(fold_batch_norm(small)(images), small(images), rtol=0, atol=1e-10)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    assert CostModel.from_tracking(tracking).parameters(plan.counts) == parameters
    assert parameters < 0.75 * sum(parameter.numel() for parameter in program.parameters())


@pytest.mark.parametrize(("name", "groups"), [("vit-fused", 9), ("swin", 14), ("convnext-v2", 9)])
def test_the_residual_stream_can_go_when_asked_for(
    name: str, groups: int, make_architecture: Make, images: Tensor
) -> None:
    program = capture(make_architecture(name), images)
    tracking = track(program, cut_normalised=True)
    assert len(tracking.layout.groups) == groups
    plan = Plan.of(tracking.layout, {group.name: range(0, group.size, 2) for group in tracking.layout.groups})
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    with torch.no_grad():
        torch.testing.assert_close(small(images), dense(images), rtol=0, atol=1e-12)
        assert (dense(images) - program(images)).abs().max() > 1e-3
    assert {axis.reason for axis in tracking.layout.frozen} <= {"input", "output", "position", "indexed"}


def test_every_group_of_a_vision_transformer_by_itself(make_architecture: Make, images: Tensor) -> None:
    program = capture(make_architecture("vit-fused"), images)
    tracking = track(program)
    assert {group.kind for group in tracking.layout.groups} == {"head", "node"}
    for group in tracking.layout.groups:
        plan = Plan.of(tracking.layout, {group.name: range(0, group.size, 2)})
        with torch.no_grad():
            small, dense = cut(program, tracking, plan)(images), masked(program, tracking, plan)(images)
            assert (dense - program(images)).abs().max() > 1e-5, group.name
        torch.testing.assert_close(small, dense, rtol=0, atol=1e-12)
