"""Folding: equal output, the right names, and no folding where it would be wrong."""

from collections.abc import Callable

import pytest
import torch
from kiridashi_server.graph import capture, fold_batch_norm, set_batch_norm_training
from kiridashi_server.graph.program import operator_name
from torch import Tensor, nn

Make = Callable[[str], nn.Module]


def norms(program: torch.fx.GraphModule) -> int:
    return sum(operator_name(node) == "batch_norm" for node in program.graph.nodes)


def test_output_is_equal_and_no_norm_is_left(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    folded = fold_batch_norm(program)
    assert norms(program) == 4
    assert norms(folded) == 0
    torch.testing.assert_close(folded(images), program(images), rtol=0, atol=1e-10)


def test_weights_keep_their_names_and_biases_stand_beside_them(make_model: Make, images: Tensor) -> None:
    folded = fold_batch_norm(capture(make_model("residual"), images))
    names = dict(folded.named_parameters())
    assert {"stem.weight", "stem.bias", "depthwise.weight", "depthwise.bias", "project.bias"} <= names.keys()
    assert not any("norm" in name for name in names)
    assert not dict(folded.named_buffers())


def test_a_norm_behind_a_concatenation_stays(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("branches"), images)
    folded = fold_batch_norm(program)
    assert norms(folded) == 1
    assert torch.equal(folded(images), program(images))


def test_a_norm_in_training_mode_stays(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    set_batch_norm_training(program, True)
    assert norms(fold_batch_norm(program)) == 4


class ReadTwice(nn.Module):
    """The convolution's output, or its weight, has a second reader."""

    def __init__(self, share_weight: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.share_weight = share_weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + (self.conv(x + 1) if self.share_weight else y)


@pytest.mark.parametrize("share_weight", [True, False])
def test_a_convolution_with_a_second_reader_is_not_changed(share_weight: bool, images: Tensor) -> None:
    model = ReadTwice(share_weight).double().eval()
    model.norm.running_var.fill_(3.0)
    program = capture(model, images)
    folded = fold_batch_norm(program)
    assert norms(folded) == 1
    torch.testing.assert_close(folded(images), program(images), rtol=0, atol=1e-12)


def test_a_norm_without_scale_and_shift_is_folded(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).double().eval()
    model[1].running_mean.copy_(torch.arange(4.0))
    program = capture(model, images)
    folded = fold_batch_norm(program)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(images), program(images), rtol=0, atol=1e-12)


def test_dtype_and_gradient_flags_are_kept_and_the_input_is_untouched(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    model[0].weight.requires_grad_(False)
    program = capture(model, images.float())
    before = program(images.float())
    folded = fold_batch_norm(program)
    weights = dict(folded.named_parameters())
    assert weights["0.weight"].dtype == weights["0.bias"].dtype == torch.float32
    assert not weights["0.weight"].requires_grad
    assert torch.equal(program(images.float()), before)
