"""What the benchmark of train steps runs: a network with half of every group, exported once, in all sizes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from kiridashi.manifest import Artifact, Preprocessing
from kiridashi.runtime.onnx import make_session
from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.artifacts import ExportSettings, export_artifacts
from kiridashi_server.export.patches import write_parameters
from kiridashi_server.export.train_step_trace import StepSettings
from kiridashi_server.export.train_step_variants import Variant, export_variants
from kiridashi_server.graph import Plan, cut, fold_batch_norm
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
CLASSES, BATCH, RATE = 12, 16, 0.005
_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class Subject:
    """A cut network, folded, its float32 file and its train steps, all in ``folder``."""

    backbone: Backbone
    plan: Plan
    model: Classifier
    folder: Path
    weights: Artifact
    variants: tuple[Variant, ...]

    @property
    def values(self) -> dict[str, FloatArray]:
        """The model's parameters by name."""
        return {name: value.detach().numpy() for name, value in self.model.named_parameters()}

    def with_weights(self, values: Mapping[str, FloatArray], folder: Path) -> Path:
        """The same files with other weights, as a device would patch them: no graph is made again."""
        folder.mkdir(parents=True, exist_ok=True)
        write_parameters(
            self.folder / self.weights.name, folder / self.weights.name, self.weights.patches, dict(values)
        )
        for variant in self.variants:
            shutil.copy(self.folder / variant.entry.graph, folder)
        return folder


def half_plan(backbone: Backbone) -> Plan:
    """The first half of every group's units: in eights, and where there are not many (heads) as it comes."""
    halves = {group.name: -(-group.size // 2) for group in backbone.layout.groups}
    steps = {name: _MULTIPLE if half >= _MULTIPLE else 1 for name, half in halves.items()}
    return Plan.of(
        backbone.layout, {name: range(-(-half // steps[name]) * steps[name]) for name, half in halves.items()}
    )


def make_subject(name: str, pixels: int, folder: Path, seed: int) -> Subject:
    """Cut half of every group, draw a head, and export the float32 file and every train step."""
    backbone = Backbone.load(name, image_size=pixels)
    plan = half_plan(backbone)
    small = fold_batch_norm(cut(backbone.program, backbone.tracking, plan))
    example = torch.zeros(1, *backbone.input_size)
    with torch.no_grad():
        model = Classifier.with_zero_head(small, int(small(example).shape[1]), CLASSES).eval()
        model.head.weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(seed))
    images = np.random.default_rng(seed).integers(0, 256, (4, pixels, pixels, 3), dtype=np.uint8)
    tunable = {key: value.detach().numpy().copy() for key, value in model.named_parameters()}
    settings = ExportSettings(kinds=("onnx-fp32",), min_top1_agreement=0.0)
    made = export_artifacts(model, example, images, preprocessing(backbone), tunable, folder, settings)
    (weights,) = made.artifacts
    step = StepSettings(backbone.input_size, (), BATCH, 1.0, 0.9)
    variants = export_variants(model, step, ("biases", "last-blocks", "all"), RATE, weights, folder)
    return Subject(backbone, plan, model, folder, weights, variants)


def preprocessing(backbone: Backbone) -> Preprocessing:
    """As a manifest says it."""
    _, height, width = backbone.input_size
    mean, std = (tuple(map(float, values)) for values in (backbone.mean, backbone.std))
    return Preprocessing(height, width, mean, std)  # type: ignore[arg-type]


class OnnxStep:
    """A train step on onnxruntime, one thread; its state stays in the runtime from call to call."""

    def __init__(self, graph: Path, values: Mapping[str, FloatArray]) -> None:
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._session: Any = make_session(graph, 1, memory_pattern=False)
        self._value = value
        self._names = [*values, *(f"momentum.{name}" for name in values)]
        self._outputs = ["loss", *(f"new.{name}" for name in self._names)]
        self.state = {name: value(np.ascontiguousarray(array)) for name, array in values.items()}
        self.state |= {f"momentum.{name}": value(np.zeros_like(array)) for name, array in values.items()}

    def __call__(self, x: FloatArray, y: FloatArray, rate: float) -> float:
        """One step; the loss before it."""
        given = {"x": self._value(x), "y": self._value(y), "lr": self._value(np.array(rate, np.float32))}
        loss, *new = self._session.run_with_ort_values(self._outputs, self.state | given)
        self.state = dict(zip(self._names, new, strict=True))
        return float(loss.numpy())


class TorchStep:
    """The same step in torch: the same parameters trained, all others frozen."""

    def __init__(self, model: Classifier, names: tuple[str, ...], memory_format: torch.memory_format) -> None:
        model = model.requires_grad_(False).to(memory_format=memory_format)  # type: ignore[call-overload]
        known = dict(model.named_parameters())
        self.trained = [known[name].requires_grad_() for name in names]
        self._model, self._format = model, memory_format
        self._optimiser = torch.optim.SGD(self.trained, lr=0.0, momentum=0.9)

    def __call__(self, x: FloatArray, y: FloatArray, rate: float) -> float:
        """One step; the loss before it."""
        images = torch.from_numpy(x).to(self.trained[0].dtype).contiguous(memory_format=self._format)
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.zero_grad()
        labels = torch.from_numpy(y).to(self.trained[0].dtype)
        loss = torch.nn.functional.cross_entropy(self._model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimiser.step()
        return float(loss.detach())


def a_batch(pixels: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """A batch of noise with one-hot labels: what it costs does not depend on what it shows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, 3, pixels, pixels)).astype(np.float32)
    return x, np.eye(CLASSES, dtype=np.float32)[np.arange(BATCH) % CLASSES]
