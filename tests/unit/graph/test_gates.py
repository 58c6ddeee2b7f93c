"""Gates: one is nothing, zero is removal, and gradients are right."""

from collections.abc import Callable

import pytest
import torch
from kiridashi_server.graph import Gated, GraphError, capture, insert_gates, track
from torch import Tensor, nn

Make = Callable[[str], nn.Module]
STRUCTURES = ["residual", "branches", "attention"]


def gated(model: nn.Module, images: Tensor, *, cuttable_output: bool = False) -> Gated:
    program = capture(model, images)
    return insert_gates(program, track(program, cuttable_output=cuttable_output))


@pytest.mark.parametrize("name", STRUCTURES)
def test_gates_of_one_change_nothing(name: str, make_model: Make, images: Tensor) -> None:
    model = make_model(name)
    module = gated(model, images)
    ones = {group: torch.ones(size, dtype=torch.float64) for group, size in module.sizes.items()}
    torch.testing.assert_close(module(images, ones), model(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(images, {}), model(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_equal_finite_differences(name: str, make_model: Make, images: Tensor) -> None:
    model = make_model(name).requires_grad_(False)  # frozen weights do not stop gradients to the gates
    module = gated(model, images)
    generator = torch.Generator().manual_seed(1)
    names = list(module.sizes)
    values = [
        torch.rand(module.sizes[group], generator=generator, dtype=torch.float64).requires_grad_() for group in names
    ]

    def loss(*gates: Tensor) -> Tensor:
        return module(images, dict(zip(names, gates, strict=True))).square().sum()

    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-5, rtol=1e-4)
    for group, value, gradient in zip(names, values, torch.autograd.grad(loss(*values), values), strict=True):
        assert (gradient != 0).sum() >= 1, group
        assert value.shape == gradient.shape


def test_a_group_with_several_readers_has_its_gate_in_each(images: Tensor) -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = nn.Conv2d(3, 4, 1)
            self.one = nn.Conv2d(4, 2, 1)
            self.two = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.made(x)
            return self.one(x) - self.two(x)

    model = TwoReaders().double()
    module = gated(model, images)
    dead = module(images, {"made": torch.zeros(4, dtype=torch.float64)})
    bias = (model.one.bias - model.two.bias).reshape(1, 2, 1, 1)
    torch.testing.assert_close(dead, bias.expand_as(dead))


def test_a_cuttable_output_is_gated_at_the_output(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    module = gated(model, images, cuttable_output=True)
    gate = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(module(images, {"0": gate}), model(images) * gate)


def test_an_input_of_integers_has_gates_that_are_not(images: Tensor) -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(4, 2, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x.to(torch.float32) / 255))

    model = Pixels()
    pixels = (images.abs() * 60).to(torch.uint8)
    module = gated(model, pixels)
    torch.testing.assert_close(module(pixels, {"conv": torch.full((4,), 0.5)}), model(pixels) / 2)


def test_the_program_is_left_alone(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    code = program.code
    module = insert_gates(program, track(program))
    assert program.code == code
    module.graph_module.get_parameter("stem.weight").data.zero_()
    assert program.get_parameter("stem.weight").abs().sum() > 0


@pytest.mark.parametrize(
    ("gates", "words"),
    [({"nothing": torch.ones(8)}, "there is no such group"), ({"expand": torch.ones(8)}, "has 12 units")],
)
def test_gates_that_do_not_fit_are_refused(
    gates: dict[str, Tensor], words: str, make_model: Make, images: Tensor
) -> None:
    with pytest.raises(GraphError, match=words):
        gated(make_model("residual"), images)(images, gates)
