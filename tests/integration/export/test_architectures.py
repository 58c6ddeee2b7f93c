"""Networks whose parameters exporters rearrange."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi.manifest import Preprocessing
from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.artifacts import ExportSettings, export_artifacts
from kiridashi_server.export.calibration import preprocess
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.onnx import export_onnx
from kiridashi_server.export.parity import run_artifact
from kiridashi_server.export.patches import with_parameters, write_parameters
from kiridashi_server.graph.fold import fold_batch_norm
from kiridashi_server.graph.program import capture
from numpy.typing import NDArray
from torch import Tensor, nn


class Tokens(nn.Module):
    """Pixels as tokens through a linear layer on three dimensions, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return nn.functional.gelu(self.mix(tokens)).mean(1)


class Unfolded(nn.Module):
    """A normalisation left behind its convolution: exporters fold it, and the bias with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class Flat(nn.Module):
    """Reads the batch size, so that capturing for one image writes a one into the program."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1)


def classifier_of(net: nn.Module, width: int, example: Tensor) -> Classifier:
    torch.manual_seed(5)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    return Classifier(capture(net, example), nn.Linear(width, 4))


def test_a_weight_that_is_stored_transposed_can_be_patched(
    example: Tensor, images: NDArray[np.uint8], preprocessing: Preprocessing, tmp_path: Path
) -> None:
    classifier = classifier_of(Tokens(), 12, example)
    weight = classifier.get_parameter("features.mix.weight").detach().numpy()
    result = export_artifacts(
        classifier,
        example,
        images,
        preprocessing,
        {"features.mix.weight": weight},
        tmp_path / "out",
        ExportSettings(("onnx-fp32",)),
    )
    (patch,) = result.artifacts[0].patches
    assert patch.transposed
    values = {"features.mix.weight": np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)}
    write_parameters(result.folder / "model.onnx", tmp_path / "patched.onnx", [patch], values)
    inputs = preprocess(images, preprocessing)
    with torch.no_grad():
        expected = with_parameters(classifier, values)(torch.from_numpy(inputs)).numpy()
    assert np.abs(run_artifact(tmp_path / "patched.onnx", inputs) - expected).max() < 1e-4


def test_a_bias_that_was_folded_away_is_reported_and_the_file_is_right(
    example: Tensor, images: NDArray[np.uint8], preprocessing: Preprocessing, tmp_path: Path
) -> None:
    classifier = classifier_of(Unfolded(), 8, example)
    names = ("features.conv.bias", "head.bias")
    tunable = {name: classifier.get_parameter(name).detach().numpy() for name in names}
    result = export_artifacts(
        classifier, example, images, preprocessing, tunable, tmp_path / "out", ExportSettings(("onnx-fp32",))
    )
    (artifact,) = result.artifacts
    assert [patch.parameter for patch in artifact.patches] == ["head.bias"]
    assert list(result.unlocated["onnx-fp32"]) == ["features.conv.bias"]
    assert artifact.parity is not None
    assert artifact.parity.max_abs_diff <= artifact.parity.tolerance


def test_features_captured_for_one_image_are_refused(example: Tensor, tmp_path: Path) -> None:
    features = capture(Flat(), example, dynamic_batch=False)
    classifier = Classifier(features, nn.Linear(example.numel(), 4))
    with pytest.raises(ExportError, match="cannot be exported to ONNX") as caught:
        export_onnx(classifier, example, tmp_path / "model.onnx")
    assert "dynamic batch" in caught.value.next_step
    assert not (tmp_path / "model.onnx").exists()


def test_calibration_images_of_another_size_are_refused_first(
    classifier: Classifier, example: Tensor, images: NDArray[np.uint8], preprocessing: Preprocessing, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="calibration images"):
        export_artifacts(classifier, example, images[:, :8], preprocessing, {}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_efficientnet_lite0_with_its_real_weights(tmp_path: Path) -> None:
    backbone = Backbone.load("efficientnet-lite0", image_size=64)
    torch.manual_seed(0)
    classifier = Classifier(fold_batch_norm(backbone.program), nn.Linear(backbone.feature_dim, 12))
    names = [name for name, _ in classifier.named_parameters() if name.endswith("bias")] + ["head.weight"]
    tunable = {name: classifier.get_parameter(name).detach().numpy().copy() for name in names}
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    preprocessing = Preprocessing(64, 64, tuple(backbone.mean), tuple(backbone.std))  # type: ignore[arg-type]
    result = export_artifacts(
        classifier,
        torch.zeros(1, 3, 64, 64),
        images,
        preprocessing,
        tunable,
        tmp_path / "out",
        ExportSettings(("onnx-fp32", "tflite-fp32")),
    )
    for artifact in result.artifacts:
        assert artifact.parity is not None
        assert artifact.parity.max_abs_diff < 1e-4
        assert {patch.parameter for patch in artifact.patches} == set(names)
