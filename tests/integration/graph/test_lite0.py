"""EfficientNet-Lite0 with its real weights, and torch-pruning as the oracle for its groups."""

from pathlib import Path

import numpy as np
import pytest
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.graph import (
    CostModel,
    Plan,
    Tracking,
    capture,
    cut,
    fold_batch_norm,
    load_cut,
    masked,
    reestimate_batch_norm,
    save_cut,
    track,
)
from torch import fx


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("efficientnet-lite0", image_size=64)


@pytest.fixture(scope="module")
def precise(backbone: Backbone) -> tuple[fx.GraphModule, Tracking]:
    """The same network in float64, captured from its program."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.float64)
    program = capture(backbone.program.double(), images)
    backbone.program.float()
    return program, track(program, cuttable_output=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_it_is_the_network_it_says(backbone: Backbone) -> None:
    assert backbone.feature_dim == 1280
    assert backbone.input_size == (3, 64, 64)
    assert sum(parameter.numel() for parameter in backbone.program.parameters()) == 3_371_008
    assert backbone.layout.digest == "7a0ae8b30ed0b3cce99d08573328a73805c0b22f71427853a01ba5e83e7a5103"
    assert backbone.fingerprint == "02006d807d83f31edc70def762cd5d6e4ff69a14b3e9c55094ae3dd75797e6e1"


def test_groups_are_those_that_torch_pruning_finds(backbone: Backbone) -> None:
    tp = pytest.importorskip("torch_pruning")
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    model = lite.EfficientNet.from_name("efficientnet-lite0", image_size=64)
    model.eval()
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3, 64, 64))
    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    oracle = set()
    for group in graph.get_all_groups(ignored_layers=[model._fc], root_module_types=[torch.nn.Conv2d]):
        deps = [dep for dep, _ in group if dep.target.module in names]
        oracle.add(frozenset(names[dep.target.module] for dep in deps if graph.is_out_channel_pruning_fn(dep.handler)))
    ours = {
        frozenset(
            member.parameter.removesuffix(".weight")
            for member in group.members
            if member.axis == 0 and "conv" in member.parameter
        )
        for group in backbone.layout.groups
    }
    assert len(ours) == 24
    assert ours == oracle


def test_every_group_by_itself(precise: tuple[fx.GraphModule, Tracking], images: torch.Tensor) -> None:
    program, tracking = precise
    rng = np.random.default_rng(1)
    with torch.no_grad():
        image = images[:1]
        whole = program(image)
        for group in tracking.layout.groups:
            kept = rng.choice(group.size, group.size // 2, replace=False)
            plan = Plan.of(tracking.layout, {group.name: kept})
            dense = masked(program, tracking, plan)(image)
            assert (dense - whole).abs().max() > 1e-3, group.name
            small = cut(program, tracking, plan)(image)
            if group.name == "_conv_head":  # the features themselves: the cut program gives only those kept
                dense = dense[:, plan.kept[group.name]]
            torch.testing.assert_close(small, dense, rtol=0, atol=1e-12)


def test_the_whole_way(backbone: Backbone, tmp_path: Path) -> None:
    """Cut, refresh, fold, save and load in single precision."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(8, 3, 64, 64, generator=generator)
    counts = {group.name: max(8, group.size // 2 // 8 * 8) for group in backbone.layout.groups}
    plan = Plan.of(backbone.layout, {name: range(count) for name, count in counts.items()})
    small = cut(backbone.program, backbone.tracking, plan)
    small = reestimate_batch_norm(small, [backbone.normalise(images)])
    save_cut(tmp_path / "cut.safetensors", plan, small)
    _, again = load_cut(backbone.program, backbone.tracking, tmp_path / "cut.safetensors")
    with torch.no_grad():
        features = small(backbone.normalise(images))
        assert torch.equal(again(backbone.normalise(images)), features)
        precise = small.double()
        folded = fold_batch_norm(precise)
        inputs = backbone.normalise(images.double())
        torch.testing.assert_close(folded(inputs), precise(inputs), rtol=0, atol=1e-10)
    assert features.shape == (8, counts["_conv_head"])
    cost = CostModel.from_tracking(backbone.tracking)
    assert cost.parameters(plan.counts) == sum(parameter.numel() for parameter in small.parameters())
    assert cost.macs(plan.counts) < 0.4 * cost.macs({})
