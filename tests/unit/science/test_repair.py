"""Closed-form repair: nothing to do for a full plan, exact where the rest can stand in, never worse by much."""

import copy

import pytest
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.repair import repair
from tiny_science import SIDE, tiny_net
from torch import nn
from torch.nn import functional


@pytest.fixture(scope="module")
def images():
    return torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def _half(backbone, *groups):
    """A plan that keeps every other unit of these groups."""
    sizes = backbone.layout.sizes
    return Plan.of(backbone.layout, {name: range(0, sizes[name], 2) for name in groups})


def _group(backbone, size):
    return next(group.name for group in backbone.layout.groups if group.size == size)


def _error(backbone, plan, program, images):
    """Mean squared difference to the dense features, as a share of their variance over images."""
    with torch.no_grad():
        kept = list(plan.kept[_group(backbone, 32)])
        dense, small = backbone.program(images)[:, kept], program(images)
    return float((dense - small).square().mean() / dense.var(dim=0).mean())


def test_a_full_plan_changes_nothing(backbone, images):
    plan = Plan.full(backbone.layout)
    small = cut(backbone.program, backbone.tracking, plan)
    repaired = repair(backbone.program, backbone.tracking, plan, small, images)
    assert repaired.consumers == 0
    assert torch.equal(repaired.program(images), backbone.program(images))


@pytest.mark.parametrize("sizes", [(48,), (16,), (48, 16), (48, 16, 32)])
def test_repair_brings_features_back_towards_the_dense_ones_on_new_images(backbone, images, sizes):
    plan = _half(backbone, *(_group(backbone, size) for size in sizes))
    small = cut(backbone.program, backbone.tracking, plan)
    before = copy.deepcopy(small.state_dict())
    repaired = repair(backbone.program, backbone.tracking, plan, small, images)
    new = torch.rand(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    assert repaired.consumers >= 1
    assert _error(backbone, plan, repaired.program, new) < 0.8 * _error(backbone, plan, small, new)
    assert all(torch.equal(small.state_dict()[name], value) for name, value in before.items())


def test_channels_with_a_twin_are_replaced_without_a_trace(images):
    net = tiny_net()
    with torch.no_grad():  # every odd unit of the expansion does what the even one before it does
        for layer in (net.expand, net.depthwise):
            layer.weight[1::2] = layer.weight[0::2]
        for norm in (net.expand_norm, net.depthwise_norm):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor[1::2] = tensor[0::2]
    backbone = Backbone.from_module(net, torch.zeros(1, 3, SIDE, SIDE), name="twins")
    plan = _half(backbone, _group(backbone, 48))
    small = cut(backbone.program, backbone.tracking, plan)
    repaired = repair(backbone.program, backbone.tracking, plan, small, images, strength=1e-7)
    assert _error(backbone, plan, small, images) > 0.1
    assert _error(backbone, plan, repaired.program, images) < 1e-5


def test_errors_made_before_a_residual_addition_are_made_good_behind_it(backbone, images):
    """With the stem cut too, the block's projection has to correct the stream it is added to."""
    plan = _half(backbone, _group(backbone, 48))
    small = cut(backbone.program, backbone.tracking, plan)
    with torch.no_grad():
        dict(small.named_parameters())["stem_norm.bias"].add_(0.3)  # an error upstream of the addition
    repaired = repair(backbone.program, backbone.tracking, plan, small, images, strength=1e-3).program
    offsets = []
    for program in (small, repaired):
        with torch.no_grad():
            offsets.append(float((program(images) - backbone.program(images)).mean(dim=0).abs().mean()))
    assert offsets[1] < 0.5 * offsets[0]


class _Tokens(nn.Module):
    """Patches, a residual block of linear layers with bias, a layer without, pooled tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12)
        self.mix, self.out = nn.Linear(12, 24), nn.Linear(24, 10, bias=False)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.down(functional.gelu(self.up(x)))
        return self.out(functional.gelu(self.mix(x))).mean(dim=1)


def test_linear_consumers_are_repaired_and_those_without_bias_left_alone(images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = _Tokens().eval()
    backbone = Backbone.from_module(net, torch.zeros(1, 3, SIDE, SIDE), name="tokens")
    up, mix = _group(backbone, 40), _group(backbone, 24)
    plan = _half(backbone, up, mix)
    small = cut(backbone.program, backbone.tracking, plan)
    repaired = repair(backbone.program, backbone.tracking, plan, small, images)
    assert repaired.consumers == 1
    changed = {
        name
        for name, value in small.state_dict().items()
        if not torch.equal(value, repaired.program.state_dict()[name])
    }
    assert changed == {"down.weight", "down.bias"}


def test_convolutions_with_larger_kernels_are_repaired(images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = nn.Sequential(
            nn.Conv2d(3, 20, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(20, 8, 3, stride=2, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).eval()
    backbone = Backbone.from_module(net, torch.zeros(1, 3, SIDE, SIDE), name="plain")
    plan = _half(backbone, _group(backbone, 20))
    small = cut(backbone.program, backbone.tracking, plan)
    repaired = repair(backbone.program, backbone.tracking, plan, small, images, strength=1e-3)
    with torch.no_grad():
        dense, before, after = (p(images) for p in (backbone.program, small, repaired.program))
    assert repaired.consumers == 1
    assert (after - dense).square().mean() < 0.2 * (before - dense).square().mean()
