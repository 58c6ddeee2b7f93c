"""Programs with several inputs and outputs: captured, cut, gated and refreshed like those with one."""

import pytest
import torch
from kiridashi_server.graph import Plan, capture, cut, masked, reestimate_batch_norm, track
from torch import Tensor, nn


class Compared(nn.Module):
    """A siamese network: both images go through the same layers; the mask is read by one of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 5, 3))
        self.compare, self.describe = nn.Linear(10, 2), nn.Linear(5, 3)

    def forward(self, image: Tensor, template: Tensor, mask: Tensor, _spare: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (torch.sigmoid(self.features(x)).mean((2, 3)) for x in (image, template))
        return self.compare(torch.cat([first, second], 1)), self.describe(first) * mask


@pytest.fixture
def inputs(images: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    return images, images.flip(0) * 0.5, mask, torch.zeros(2)


@pytest.fixture
def model() -> nn.Module:
    return Compared().double()


def test_all_inputs_and_outputs_are_kept(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = capture(model, inputs)
    for batch in (inputs, (*(value[:1] for value in inputs[:3]), inputs[3])):
        expected = model.eval()(*batch)
        for result, wanted in zip(program(*batch), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=1e-14)


def test_a_single_example_opens_the_batch_of_all_inputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = capture(model, (*(value[:1] for value in inputs[:3]), inputs[3]))
    assert [tuple(result.shape) for result in program(*inputs)] == [(3, 2), (3, 3)]


def test_the_cut_is_exact(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = capture(model, inputs)
    tracking = track(program)
    assert dict(tracking.layout.sizes) == {"features.0": 6, "features.3": 5}
    plan = Plan.of(tracking.layout, {"features.0": [1, 4], "features.3": [0, 2, 3]})
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    for result, wanted in zip(small(*inputs), dense(*inputs), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12)
    assert (dense(*inputs)[1] - program(*inputs)[1]).abs().max() > 1e-4


def test_statistics_are_refreshed(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = capture(model, inputs)
    refreshed = reestimate_batch_norm(program, [inputs])
    assert not torch.equal(refreshed.get_buffer("features.1.running_mean"), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(program.get_buffer("features.1.running_mean"), torch.zeros(6, dtype=torch.float64))


class Summed(nn.Module):
    """Any number of inputs after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        return self.leave(torch.sigmoid(sum((self.enter(other) for other in others), start=self.enter(first))))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_inputs_without_names(count: int) -> None:
    batches = [tuple(torch.rand(size, 4, dtype=torch.float64) for _ in range(count)) for size in (1, 5)]
    model = Summed().double()
    program = capture(model, batches[0])
    tracking = track(program)
    plan = Plan.of(tracking.layout, {"enter": [1, 3]})
    for batch in batches:
        torch.testing.assert_close(program(*batch), model(*batch), rtol=0, atol=1e-14)
        small, dense = cut(program, tracking, plan)(*batch), masked(program, tracking, plan)(*batch)
        torch.testing.assert_close(small, dense, rtol=0, atol=1e-12)
