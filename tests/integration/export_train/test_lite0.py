"""EfficientNet-Lite0 with its real weights on a shipped task: what a device will really run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.train_step import export_train_step
from kiridashi_server.export.train_step_parameters import HEAD_PARAMETERS, bias_head_parameters
from kiridashi_server.graph import Plan, cut, fold_batch_norm
from kiridashi_server.tasks import Samples, load_shipped, shipped_names
from numpy.typing import NDArray

BATCH = 16


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("efficientnet-lite0", image_size=64)


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> Classifier:
    return Classifier.with_zero_head(fold_batch_norm(backbone.program), backbone.feature_dim, 12)


def _inputs(backbone: Backbone, samples: Samples) -> NDArray[np.float32]:
    pixels = torch.from_numpy(samples.images).permute(0, 3, 1, 2).float() / 255
    inputs: NDArray[np.float32] = backbone.normalise(pixels).contiguous().numpy()
    return inputs


def test_default_parameters_are_the_last_four_blocks_and_the_convolution_behind_them(model: Classifier) -> None:
    names = bias_head_parameters(model)
    blocks = [name.split(".")[2] for name in names if "._blocks." in name]
    assert blocks == [block for block in ("12", "13", "14", "15") for _ in range(3)]
    assert names[-3:] == ("features._conv_head.bias", *HEAD_PARAMETERS)


def test_a_few_steps_learn_a_shipped_task(
    backbone: Backbone, model: Classifier, export: Callable[..., Any], tmp_path: Path
) -> None:
    samples = load_shipped(shipped_names()[0]).split("tune")
    x, labels = _inputs(backbone, samples), samples.labels
    y = np.eye(12, dtype=np.float32)[labels]
    stepper = export(model, bias_head_parameters(model), BATCH, size=64)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(40):
        chosen = rng.choice(len(x), BATCH, replace=False)
        losses.append(stepper.step(x[chosen], y[chosen], 0.02))
    assert losses[0] == pytest.approx(np.log(12), rel=1e-5)  # the head is zero at first
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_a_cut_model_is_exported_like_the_whole_one(backbone: Backbone, tmp_path: Path) -> None:
    half = {group.name: range(-(-group.size // 16) * 8) for group in backbone.layout.groups}
    small = fold_batch_norm(cut(backbone.program, backbone.tracking, Plan.of(backbone.layout, half)))
    width = small(torch.zeros(1, 3, 64, 64)).shape[1]
    model = Classifier.with_zero_head(small, width, 12)
    names = bias_head_parameters(model)
    report = export_train_step(model, (3, 64, 64), names, BATCH, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert len(names) == 15
    assert width < backbone.feature_dim
    assert report.gradient_max_rel < 2e-5


def test_export_is_quick_close_to_torch_and_small(model: Classifier, tmp_path: Path) -> None:
    names = bias_head_parameters(model)
    report = export_train_step(model, (3, 64, 64), names, BATCH, tmp_path / "step.onnx", tmp_path / "state.npz")
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    assert report.gradient_max_rel < 2e-5
    assert report.loss_max_abs_diff < 2e-6
    assert report.bytes == (tmp_path / "step.onnx").stat().st_size < 1.02 * weights
    assert report.nodes < 600
    assert report.seconds < 20


_DEVICE = """
import sys
import numpy as np
import onnxruntime

graph, state = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
with np.load(state, allow_pickle=False) as values:
    kept = {name: values[name] for name in values.files}
kept |= {f"momentum.{name}": np.zeros_like(value) for name, value in list(kept.items())}
names = [output.name for output in session.get_outputs()]
inputs = {"x": np.zeros((16, 3, 64, 64), np.float32), "y": np.eye(12, dtype=np.float32)[np.arange(16) % 12]}
for _ in range(3):
    results = dict(zip(names, session.run(names, {**inputs, "lr": np.array(0.01, np.float32), **kept})))
    kept = {name: results[f"new.{name}"] for name in kept}
assert "torch" not in sys.modules and "onnx" not in sys.modules
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def test_a_process_without_torch_runs_it_in_little_memory(model: Classifier, tmp_path: Path) -> None:
    graph, state = tmp_path / "step.onnx", tmp_path / "state.npz"
    export_train_step(model, (3, 64, 64), bias_head_parameters(model), BATCH, graph, state)
    done = subprocess.run(
        [sys.executable, "-c", _DEVICE, str(graph), str(state)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200 * 1024  # KiB
