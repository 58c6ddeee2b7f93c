"""Every kind of layer, all its parameters trained: gradients and losses as torch has them, measured at export.

That the measurement itself finds a wrong graph is tested in ``test_parity.py``.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.train_step import export_train_step
from kiridashi_server.graph import capture
from torch import Tensor, nn

CONVOLUTIONS = {
    "dense 3x3": nn.Conv2d(6, 8, 3, padding=1),
    "pointwise": nn.Conv2d(6, 8, 1),
    "pointwise, stride 2": nn.Conv2d(6, 8, 1, stride=2),
    "depthwise 5x5": nn.Conv2d(6, 6, 5, padding=2, groups=6),
    "depthwise, stride 2": nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
    "depthwise, two filters a channel": nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "grouped": nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "grouped, stride 2, dilated": nn.Conv2d(6, 9, 3, stride=2, padding=2, dilation=2, groups=3),
    "uneven kernel, stride and padding": nn.Conv2d(6, 8, (3, 5), stride=(1, 3), padding=(2, 1)),
    "stride over the kernel": nn.Conv2d(6, 8, 2, stride=3),
    "more padding than kernel": nn.Conv2d(6, 8, 1, padding=1),
    "rows left over": nn.Conv2d(6, 8, 4, stride=4, padding=1),
    "padding by name": nn.Conv2d(6, 8, 3, padding="same"),
    "without bias": nn.Conv2d(6, 8, 3, bias=False),
    "uneven padding apart": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 6, 3, stride=2, groups=6)),
    "even padding apart": nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(6, 6, 5, groups=6)),
}
POINTWISE = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.25),
    "leaky relu": nn.LeakyReLU(0.1),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
}
POOLS = {
    "max": nn.MaxPool2d(2),
    "max, overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "mean": nn.AvgPool2d(2),
    "mean, overlapping": nn.AvgPool2d(3, stride=2, padding=1),
    "mean, row left over": nn.AvgPool2d(3, stride=3),
}


def _all_layers() -> dict[str, nn.Module]:
    kinds = {"convolution": CONVOLUTIONS, "pointwise": POINTWISE, "pool": POOLS}
    return {f"{kind}: {name}": layer for kind, layers in kinds.items() for name, layer in layers.items()}


@pytest.mark.parametrize("layer", _all_layers().values(), ids=_all_layers().keys())
def test_gradients_through_and_of_a_layer(
    classifier: Callable[..., Classifier], tmp_path: Path, layer: nn.Module
) -> None:
    model = classifier(nn.Conv2d(3, 6, 1), layer, nn.LazyConv2d(5, 1), size=11)
    names = [name for name, _ in model.named_parameters()]
    report = export_train_step(model, (3, 11, 11), names, 3, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert report.gradient_max_rel < 2e-5
    assert report.loss_max_abs_diff < 2e-6


class _Gated(nn.Module):
    """A residual block with squeeze-and-excitation, a split and a concatenation, built of plain operators."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        y = y + self.wide(torch.relu(self.norm(y)))  # normalised before the convolution: cannot be folded
        first, second = y.split([3, 5], dim=1)
        return torch.cat([second / 2, first - 0.5], dim=1)


def test_gates_residuals_splits_and_a_normalisation_that_stays(
    classifier: Callable[..., Classifier], tmp_path: Path
) -> None:
    model = classifier(_Gated(), size=8)
    names = [name for name, _ in model.named_parameters()]
    assert "features.0.norm.weight" in names
    report = export_train_step(model, (3, 8, 8), names, 3, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert report.gradient_max_rel < 2e-5


class _Transformer(nn.Module):
    """A plain vision transformer of two blocks with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.ModuleList([_Attention(), _Attention()])
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        first: Tensor = self.norm(tokens)[:, 0]
        return first


class _Attention(nn.Module):
    """Pre-norm attention and MLP, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)
        self.projection, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.projection(self.before(x)).view(count, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, length, width)
        x = x + self.out(mixed)
        mlp: Tensor = self.mlp(self.between(x))
        return x + mlp


def test_a_plain_vision_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(capture(_Transformer(), torch.zeros(2, 3, 16, 16)), nn.Linear(16, 4))
    names = [name for name, _ in model.named_parameters()]
    report = export_train_step(model, (3, 16, 16), names, 3, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert report.gradient_max_rel < 2e-5


def test_an_operator_without_translation_is_named_and_nothing_is_written(
    classifier: Callable[..., Classifier], tmp_path: Path
) -> None:
    model = classifier(nn.Conv2d(3, 6, 1), nn.CELU())
    with pytest.raises(ExportError, match=r"aten\.\w+") as caught:
        export_train_step(model, (3, 16, 16), ["features.0.bias"], 2, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert caught.value.next_step
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 2, 2), (3, 2, 0)])
def test_gradients_of_depthwise_layers_on_wide_maps(
    classifier: Callable[..., Classifier], tmp_path: Path, kernel: int, stride: int, padding: int
) -> None:
    stem = nn.Conv2d(3, 4, 3, padding=1)
    model = classifier(stem, nn.Conv2d(4, 4, kernel, stride, padding, groups=4), nn.Tanh(), size=90)
    names = [name for name, _ in model.named_parameters()]
    report = export_train_step(model, (3, 90, 90), names, 2, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert report.gradient_max_rel < 1e-5
