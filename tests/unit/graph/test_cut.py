"""Cuts: equal to the masked dense model, for every structure, and nothing else changed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from kiridashi_server.graph import (
    GraphError,
    Layout,
    Plan,
    PlanError,
    Tracking,
    capture,
    cut,
    fold_batch_norm,
    load_cut,
    masked,
    save_cut,
    track,
)
from torch import Tensor, fx, nn
from torch.nn import functional

Make = Callable[[str], nn.Module]
Captured = Callable[[str], tuple[fx.GraphModule, Tracking]]
STRUCTURES = ["residual", "branches", "attention", "unknown"]


def random_plan(layout: Layout, seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    return Plan.of(
        layout,
        {group.name: rng.choice(group.size, rng.integers(1, group.size + 1), replace=False) for group in layout.groups},
    )


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seed", range(4))
def test_the_cut_equals_the_masked_dense_model(name: str, seed: int, captured: Captured, images: Tensor) -> None:
    program, tracking = captured(name)
    plan = random_plan(tracking.layout, seed)
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    for batch in (images, images[:1]):
        torch.testing.assert_close(small(batch), dense(batch), rtol=0, atol=1e-12)
    if plan != Plan.full(tracking.layout):
        assert (dense(images) - program(images)).abs().max() > 1e-3  # the mask does something


def test_a_wrong_unit_is_noticed(captured: Captured, images: Tensor) -> None:
    """The check above can fail: another unit gives another output."""
    program, tracking = captured("residual")
    one = Plan.of(tracking.layout, {"expand": range(6)})
    other = Plan.of(tracking.layout, {"expand": range(1, 7)})
    difference = cut(program, tracking, one)(images) - masked(program, tracking, other)(images)
    assert difference.abs().max() > 1e-3


class Fixtures:
    """Modules with structure that the named models do not have."""

    class Multiplier(nn.Module):
        """A depthwise convolution that makes two channels of each."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sigmoid(self.depthwise(self.first(x))))

    class Tied(nn.Module):
        """One weight under two names, called twice."""

        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 6)
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6, bias=False)
            self.second.weight = self.first.weight
            self.leave = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x.mean((2, 3)))
            return self.leave(self.second(torch.tanh(self.first(x))))

    class Explicit(nn.Module):
        """Attention from matrix products, split by ``chunk``, reading a buffer along a group."""

        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 8)
            self.qkv = nn.Linear(8, 36)
            self.out = nn.Linear(12, 4)
            self.register_buffer("scale", torch.rand(3, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.exp(self.enter(x.flatten(2).transpose(1, 2)) / 4)
            batch, tokens, _ = x.shape
            q, k, v = (part.view(batch, tokens, 3, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            weights = torch.softmax(q @ k.transpose(-1, -2) * 0.5, dim=-1)
            y = (weights @ v) * self.scale
            return self.out(y.transpose(1, 2).flatten(2)).mean(1)

    class Merged(nn.Module):
        """The batch merged with heads: the exporter computes that size in the graph, the program infers it."""

        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(3, 12)
            self.inner = nn.Linear(4, 5)
            self.out = nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x.mean((2, 3)))
            x = self.inner(x.reshape(x.shape[0] * 3, 4))
            return self.out(functional.relu(x).reshape(-1, 15))

    class Grouped(nn.Module):
        """A grouped convolution and as many normalised groups between two full convolutions."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)
            self.norm = nn.GroupNorm(2, 8)
            self.wide = nn.Conv2d(8, 10, 1)
            self.last = nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional.gelu(self.wide(self.norm(self.grouped(self.first(x))))))


@pytest.mark.parametrize(
    ("model", "groups"),
    [
        (Fixtures.Multiplier(), {"first": 4, "depthwise": 2}),
        (Fixtures.Tied(), {"enter": 6}),
        (Fixtures.Explicit(), {"enter": 8, "qkv:head": 3, "qkv": 4, "qkv:node2": 4}),
        (Fixtures.Merged(), {"enter": 3, "enter:node2": 4, "inner": 5}),
        (Fixtures.Grouped(), {"first": 2, "first:filter2": 4, "wide": 10}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_structures(model: nn.Module, groups: dict[str, int], images: Tensor) -> None:
    program = capture(model.double(), images)
    tracking = track(program)
    assert dict(tracking.layout.sizes) == groups
    for seed in range(3):
        plan = random_plan(tracking.layout, seed)
        small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
        for batch in (images, images[:1]):
            torch.testing.assert_close(small(batch), dense(batch), rtol=0, atol=1e-12)


def test_tied_weights_stay_tied(images: Tensor) -> None:
    program = capture(Fixtures.Tied().double(), images)
    tracking = track(program)
    small = cut(program, tracking, Plan.of(tracking.layout, {"enter": [1, 4]}))
    assert len([p for p in small.parameters() if p.shape == (2, 2)]) == 1


def test_flags_dtypes_and_the_input_are_kept(make_model: Make, images: Tensor) -> None:
    model = make_model("residual").float()
    model.expand.weight.requires_grad_(False)
    program = capture(model, images.float())
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    tracking = track(program)
    small = cut(program, tracking, Plan.of(tracking.layout, {"expand": [0, 5]}))
    assert small.get_parameter("expand.weight").shape == (2, 8, 1, 1)
    assert small.get_parameter("expand.weight").dtype == torch.float32
    assert not small.get_parameter("expand.weight").requires_grad
    assert small.get_parameter("project.weight").requires_grad
    assert small.get_buffer("expand_norm.running_mean").shape == (2,)
    for name, tensor in program.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_cut_program_can_be_tracked_and_cut_again(captured: Captured, images: Tensor) -> None:
    program, tracking = captured("attention")
    once = cut(program, tracking, Plan.of(tracking.layout, {"qkv:head": [1, 2, 3], "up": range(8)}))
    again = track(once)
    assert dict(again.layout.sizes) == {"qkv:head": 3, "up": 8}
    twice = cut(once, again, Plan.of(again.layout, {"qkv:head": [0, 2], "up": [7]}))
    direct = cut(program, tracking, Plan.of(tracking.layout, {"qkv:head": [1, 3], "up": [7]}))
    torch.testing.assert_close(twice(images), direct(images), rtol=0, atol=0)


def test_a_cut_program_can_be_exported_and_folded(captured: Captured, images: Tensor) -> None:
    program, tracking = captured("residual")
    small = cut(program, tracking, random_plan(tracking.layout))
    folded = fold_batch_norm(small)
    torch.testing.assert_close(folded(images), small(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(capture(folded, images)(images), folded(images), rtol=0, atol=0)


def test_a_plan_for_another_layout_is_refused(captured: Captured, images: Tensor) -> None:
    program, tracking = captured("residual")
    _, other = captured("branches")
    with pytest.raises(PlanError, match="another layout"):
        cut(program, tracking, Plan.full(other.layout))


def test_saving_and_loading(captured: Captured, images: Tensor, tmp_path: Path) -> None:
    program, tracking = captured("residual")
    plan = random_plan(tracking.layout, 1)
    small = cut(program, tracking, plan)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.25)  # as after training
    path = tmp_path / "small.safetensors"
    save_cut(path, plan, small)
    again_plan, again = load_cut(program, tracking, path)
    assert again_plan == plan
    assert torch.equal(again(images), small(images))
    assert [file.name for file in tmp_path.iterdir()] == ["small.safetensors"]


def test_files_that_are_no_cut_are_refused(captured: Captured, images: Tensor, tmp_path: Path) -> None:
    program, tracking = captured("residual")
    path = tmp_path / "file.safetensors"
    with pytest.raises(GraphError, match="cannot be read"):
        load_cut(program, tracking, path)
    path.write_bytes(b"not a model")
    with pytest.raises(GraphError, match="cannot be read"):
        load_cut(program, tracking, path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(GraphError, match="no saved cut"):
        load_cut(program, tracking, path)
    plan = random_plan(tracking.layout, 1)
    save_cut(path, plan, fold_batch_norm(cut(program, tracking, plan)))
    with pytest.raises(GraphError, match="names, shapes or dtypes differ"):
        load_cut(program, tracking, path)
