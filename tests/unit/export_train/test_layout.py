from __future__ import annotations

import pytest
import torch
from kiridashi_server.export.train_step_layout import channels_outside, depthwise, patches, pointwise
from kiridashi_server.graph import capture
from torch import nn
from torch.nn import functional


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(5, 5), (8, 8), (20, 11), (9, 70)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 2, 2), (3, 2, 0), (4, 3, 1), (1, 1, 0)])
def test_depthwise_forms_are_the_convolution(
    size: tuple[int, int], kernel: int, stride: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    x, weight, bias = _random(4, 3, *size), _random(4, 1, kernel, kernel, seed=1), _random(4, seed=2)
    expected = functional.conv2d(x.transpose(0, 1), weight, bias, stride, padding, groups=4)
    found = depthwise(x, weight, bias, (stride, stride), (padding, padding))
    torch.testing.assert_close(found.transpose(0, 1), expected)


def test_windows_side_by_side_and_single_places() -> None:
    x = _random(3, 2, 8, 12)
    for kernel, function in ((4, patches), (1, pointwise)):
        weight, bias = _random(5, 3, kernel, kernel, seed=1), _random(5, seed=2)
        expected = functional.conv2d(x.transpose(0, 1), weight, bias, kernel)
        found = function(x, weight, bias, (kernel, kernel), (0, 0))
        torch.testing.assert_close(found.transpose(0, 1), expected)


def test_only_what_depends_on_trained_parameters_changes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 5, 1))
    images = torch.randn(2, 3, 6, 6)
    program = capture(net.eval(), images)
    changed = channels_outside(program, {"3.bias"})
    calls = [node.target for node in changed.graph.nodes if node.op == "call_function"]
    assert calls.count(torch.ops.aten.conv2d.default) == 2
    assert calls.count(pointwise) == 1
    torch.testing.assert_close(changed(images), program(images))
    assert all(node.target is not pointwise for node in program.graph.nodes)


def test_a_value_that_is_changed_in_place_and_read_elsewhere_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.conv(x)
            changed: torch.Tensor = kept.relu_() + kept
            return changed

    program = capture(Twice().eval(), torch.randn(2, 3, 4, 4))
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(channels_outside(program, {"conv.weight"})(images), program(images))
