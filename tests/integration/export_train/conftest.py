"""Small classifiers, and onnxruntime sessions that keep a train step's state as a device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.train_step import export_train_step
from kiridashi_server.graph import capture, fold_batch_norm
from numpy.typing import NDArray
from torch import nn

FloatArray = NDArray[np.float32]


class Stepper:
    """Runs a train-step graph; ``values`` and ``momenta`` are what the last step left."""

    def __init__(self, graph: Path, values: dict[str, FloatArray]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.values = dict(values)
        self.momenta = {name: np.zeros_like(value) for name, value in values.items()}
        self.norm = float("nan")

    def step(self, x: FloatArray, y: FloatArray, rate: float) -> float:
        inputs: dict[str, Any] = {"x": x, "y": y, "lr": np.asarray(rate, np.float32), **self.values}
        inputs |= {f"momentum.{name}": value for name, value in self.momenta.items()}
        names = [output.name for output in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(names, inputs), strict=True))
        self.values = {name: results[f"new.{name}"] for name in self.values}
        self.momenta = {name: results[f"new.momentum.{name}"] for name in self.values}
        self.norm = float(results["gradient_norm"])
        return float(results["loss"])


def _classifier(*layers: nn.Module, size: int = 16, classes: int = 4, seed: int = 0) -> Classifier:
    whole = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.zeros(2, 3, size, size)
    whole(images)  # lazy layers learn their width
    torch.manual_seed(seed)
    for module in whole.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    program = fold_batch_norm(capture(whole, images))
    return Classifier(program, nn.Linear(program(images).shape[1], classes))


@pytest.fixture(scope="session")
def classifier() -> Callable[..., Classifier]:
    """Makes a classifier of layers on feature maps, with the mean over places behind them, folded."""
    return _classifier


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


@pytest.fixture(scope="session")
def tiny() -> Classifier:
    """A small depthwise-separable network on images of 16 x 16, four classes."""
    stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    return _classifier(*stem, _block(8, 16, 2), _block(16, 24, 1))


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Stepper]:
    """Exports a train step and opens it with the values of its state file."""

    def run(model: Classifier, names: Sequence[str], batch: int, size: int = 16, clip_norm: float = 1.0) -> Stepper:
        graph, state = tmp_path / f"step{batch}.onnx", tmp_path / f"state{batch}.npz"
        export_train_step(model, (3, size, size), names, batch, graph, state, clip_norm)
        with np.load(state, allow_pickle=False) as values:
            return Stepper(graph, {name: values[name] for name in names})

    return run
