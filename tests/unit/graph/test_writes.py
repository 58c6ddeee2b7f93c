"""Models that write in place, or compute without gradients, are captured as what they compute."""

from collections.abc import Callable

import pytest
import torch
from kiridashi_server.graph import Plan, capture, cut, fold_batch_norm, load_cut, masked, save_cut, track
from torch import Tensor, nn
from torch.nn import functional

Step = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Two convolutions with normalisation between them, and ``step`` in between."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.enter = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 1)
        self.leave = nn.Conv2d(8, 4, 1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.step(self, self.norm(self.enter(x))))


def border(model: Model, y: Tensor) -> Tensor:
    y[:, :, 0] = 0.5
    y[:, :, :, 1:3] = y[:, :, :, 2:4]
    return torch.sigmoid(y)


def view(model: Model, y: Tensor) -> Tensor:
    flat = y.flatten(2)
    flat.add_(torch.tanh(model.middle(y)).flatten(2))
    return torch.sigmoid(y)


def channels(model: Model, y: Tensor) -> Tensor:
    y[:, 2] = 0.0
    y[:, 4:6] *= 2
    return torch.sigmoid(y)


def assembled(model: Model, y: Tensor) -> Tensor:
    result = torch.zeros_like(y)
    result[:, :, ::2] = y[:, :, ::2]
    result[result < 0] = -0.1
    return result


def dropped(model: Model, y: Tensor) -> Tensor:
    kept = functional.dropout(y, 0.5, model.training)  # in evaluation mode this is ``y`` itself
    kept.relu_()
    return torch.sigmoid(y)


def counted(model: Model, y: Tensor) -> Tensor:
    model.calls.add_(1)
    return y * model.calls


def activated(model: Model, y: Tensor) -> Tensor:
    side = model.middle(y)
    functional.relu_(y)
    y += 1
    return torch.sigmoid(y) + side


CUT: dict[str, tuple[Step, dict[str, int]]] = {
    "a border": (border, {"enter": 8}),
    "through a view": (view, {"enter": 8}),
    "single channels": (channels, {}),
    "assembled": (assembled, {"enter": 8}),
    "through a dropout": (dropped, {"enter": 8}),
    "counted": (counted, {"enter": 8}),
    "in-place activations": (activated, {"enter": 8}),
}


@pytest.mark.parametrize("name", CUT)
def test_writes_are_kept_and_the_cut_is_exact(
    name: str, images: Tensor, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    step, groups = CUT[name]
    model = randomise(Model(step))
    program = capture(model, images)
    expected = model(images)
    for _ in range(2):  # the program has no state
        torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-14)
    tracking = track(program)
    assert dict(tracking.layout.sizes) == groups
    plan = Plan.of(tracking.layout, dict.fromkeys(groups, (0, 3, 6)))
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    torch.testing.assert_close(small(images), dense(images), rtol=0, atol=1e-12)
    if groups:
        assert (dense(images) - program(images)).abs().max() > 1e-3
    torch.testing.assert_close(fold_batch_norm(small)(images), small(images), rtol=0, atol=1e-10)


def test_plain_in_place_operators_stay(images: Tensor) -> None:
    names = [node.name for node in capture(Model(activated).double(), images).graph.nodes]
    assert "relu_" in names


def without_gradients(model: Model, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(model.middle(y))
        with torch.autocast("cpu", enabled=False):
            gate = gate * 2
    return y * gate


def with_gradients(model: Model, y: Tensor) -> Tensor:
    with torch.no_grad(), torch.enable_grad():
        return torch.sigmoid(model.middle(y))


@pytest.mark.parametrize(("step", "learns"), [(without_gradients, False), (with_gradients, True)])
def test_regions_without_gradients(
    step: Step, learns: bool, images: Tensor, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    model = randomise(Model(step))
    program = capture(model, images)
    torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-14)
    tracking = track(program)
    assert tracking.layout.sizes["enter"] == 8
    small = cut(program, tracking, Plan.of(tracking.layout, {"enter": (1, 2, 5)}))
    small(images).square().sum().backward()
    assert (small.get_parameter("middle.weight").grad is not None) == learns
    assert small.get_parameter("leave.weight").grad is not None


def conditional(model: Model, y: Tensor) -> Tensor:
    result: Tensor = torch.cond(y.sum() > 0, lambda z: model.middle(z).sin(), lambda z: z.cos(), (y,))
    return result


def mixed(model: Model, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.sigmoid(model.middle(y))
    return y.float()


@pytest.mark.parametrize(
    ("step", "name"), [(conditional, "python.cond"), (mixed, "python.wrap_with_autocast")], ids=["cond", "autocast"]
)
def test_operators_with_graphs_of_their_own_are_frozen_and_kept(
    step: Step, name: str, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    images = images.float()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid(), Model(step)).eval()
    program = capture(model, images)
    torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-6)
    tracking = track(program)
    assert dict(tracking.unknown) == {name: 1}
    assert dict(tracking.layout.sizes) == {"0": 3}
    plan = Plan.of(tracking.layout, {"0": (0, 2)})
    small = cut(program, tracking, plan)
    torch.testing.assert_close(small(images), masked(program, tracking, plan)(images), rtol=0, atol=1e-6)
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    save_cut(path, plan, small)
    assert torch.equal(load_cut(program, tracking, path)[1](images), small(images))


class Precisions(nn.Module):
    """Float32 first, bfloat16 after it; its first input is called as gates might be."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4).bfloat16()

    def forward(self, gate: Tensor, gate_1: Tensor) -> Tensor:
        return self.leave(torch.sigmoid(self.enter(gate + gate_1)).bfloat16()).float()


def test_gates_have_the_type_of_what_they_multiply() -> None:
    model, inputs = Precisions(), (torch.rand(3, 4), torch.rand(3, 4))
    program = capture(model, inputs)
    tracking = track(program)
    assert dict(tracking.layout.sizes) == {"enter": 8}
    plan = Plan.of(tracking.layout, {"enter": (0, 1, 5)})
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    assert (small(*inputs) - dense(*inputs)).abs().max() < 0.02
    assert (program(*inputs) - dense(*inputs)).abs().max() > 0.02
