"""The train-step graph: one SGD step of a classifier as a plain ONNX graph that stock onnxruntime runs.

A device tunes with it without any training framework. Inputs ``x`` [batch, 3, H, W] (preprocessed), ``y``
[batch, classes], ``lr`` [], every trained parameter by name, and ``momentum.<name>`` for each; outputs ``loss`` [],
``gradient_norm`` [] (before clipping), ``new.<name>`` and ``new.momentum.<name>``; all float32. A row of ``y`` is the
one-hot label times the sample's weight: a row of zeros is padding. Equations: ``train_step_trace``.

Everything that is not trained is an initialiser, so the runtime fuses and prepacks it as in an inference graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx
import torch
from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.npz import deterministic_npz
from kiridashi_server.export.onnx import canonical_bytes
from kiridashi_server.export.train_step_onnx import to_onnx
from kiridashi_server.export.train_step_parity import StepParity, check_gradients
from kiridashi_server.export.train_step_trace import StepSettings, trace_step


class TrainStepReport(msgspec.Struct, frozen=True):
    """What was exported, and how far it is from torch (see ``StepParity``).

    ``nodes`` and ``bytes`` describe the graph; ``seconds`` is the export's wall time, the check included.
    """

    parameters: tuple[str, ...]
    nodes: int
    bytes: int
    seconds: float
    gradient_max_rel: float
    loss_max_abs_diff: float


def export_train_step(
    model: Classifier,
    example_shape: tuple[int, int, int],
    parameters: Sequence[str],
    batch: int,
    path_graph: Path,
    path_state: Path,
    clip_norm: float = 1.0,
    momentum: float = 0.9,
) -> TrainStepReport:
    """Write the train-step graph of ``model`` and its initial state, after checking it against torch.

    The same arguments give the same bytes. Nothing is written when anything is refused.

    Args:
        model: the classifier, batch normalisation folded, float32; left as it is.
        example_shape: sizes of one image, (3, H, W).
        parameters: names out of ``model.named_parameters()`` that the device trains.
        batch: images per step; the graph has no other.
        path_graph: where the ONNX file goes.
        path_state: where the npz with the initial values of ``parameters`` goes (momenta start at 0).
        clip_norm: largest norm of all gradients together; longer ones are shortened to it.
        momentum: share of the last update that is kept.

    Raises:
        InputError: an unknown or repeated name, or a number out of range.
        ExportError: the model uses an operator without translation, or the graph and torch disagree.
    """
    started = time.perf_counter()
    settings = StepSettings(example_shape, tuple(parameters), batch, clip_norm, momentum)
    proto, parity = build_train_step(model, settings)
    data = canonical_bytes(proto)
    known = dict(model.named_parameters())
    state = {name: known[name].detach().numpy() for name in settings.parameters}
    deterministic_npz(path_state, state)
    write_atomic(path_graph, data)
    return TrainStepReport(
        parameters=settings.parameters,
        nodes=len(proto.graph.node),
        bytes=len(data),
        seconds=time.perf_counter() - started,
        gradient_max_rel=parity.gradient_max_rel,
        loss_max_abs_diff=parity.loss_max_abs_diff,
    )


def build_train_step(model: Classifier, settings: StepSettings) -> tuple[Any, StepParity]:
    """The train step as an ONNX model that holds all frozen weights, and how far it is from torch.

    Raises: as :func:`export_train_step`.
    """
    _check(model, settings)
    step = trace_step(model, settings)
    proto = to_onnx(step.program, settings.inputs, settings.outputs, step.frozen)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError("the train-step graph is not valid ONNX", why=str(error)) from error
    return proto, check_gradients(model, canonical_bytes(proto), settings)


def _check(model: Classifier, settings: StepSettings) -> None:
    known = dict(model.named_parameters())
    names = settings.parameters
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise InputError(
            "these parameters cannot be trained: " + (", ".join(unknown or names) or "none was named"),
            why="each must be one of the model's parameters, and named once",
            next_step="compare with dict(model.named_parameters())",
        )
    other = [name for name, value in known.items() if value.dtype != torch.float32]
    if other:
        raise InputError(f"'{other[0]}' is {known[other[0]].dtype}", why="train steps are float32 throughout")
    good = (
        len(settings.example_shape) == 3
        and min(settings.example_shape) >= 1
        and settings.batch >= 1
        and 0.0 < settings.clip_norm < math.inf
        and 0.0 <= settings.momentum < 1.0
    )
    if not good:
        raise InputError(
            f"no train step for images {settings.example_shape}, batch {settings.batch}, "
            f"clip norm {settings.clip_norm}, momentum {settings.momentum}",
            why="sizes and batch must be at least 1, the clip norm positive, the momentum in [0, 1)",
        )
