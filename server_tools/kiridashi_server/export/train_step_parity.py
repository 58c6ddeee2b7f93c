"""Whether a train-step graph does what torch does: first gradients, and the losses of the first three steps.

Longer runs say nothing about the graph: two float32 implementations of one network, or torch and itself with
another convolution library, drift apart tenfold every few steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.train_step_trace import StepSettings

GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
_TORCH_FACTOR = 10.0
_STEPS = 3
_LEARNING_RATE = 0.01
_DRAWS = 3
_NEGLIGIBLE = 1e-2
_TINY = float(np.finfo(np.float32).tiny)

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepParity:
    """How far a train-step graph is from torch.

    Attributes:
        gradient_max_rel: over the trained parameters, the largest difference of a gradient element divided by the
            largest element of that parameter's gradient (of all gradients times 0.01, if that is larger: some
            gradients are zero but for rounding); or the relative difference of the norms before clipping, if larger.
        loss_max_abs_diff: largest difference of a loss over the first three steps.
        precise_max_rel: as ``gradient_max_rel``, from torch in float64; asked for only where the first is too large.
        torch_precise_max_rel: the same of torch in float32, or 0.
    """

    gradient_max_rel: float
    loss_max_abs_diff: float
    precise_max_rel: float
    torch_precise_max_rel: float

    @property
    def passes(self) -> bool:
        """Whether both differences are within the tolerances (a NaN is not).

        On large maps some of millions of values lie on the kink of a ReLU, and sums are long: torch itself then differs
        from torch in float64. A gradient may be ten times as far from that as torch is; a wrong graph is far beyond.
        """
        allowed = max(GRADIENT_TOLERANCE, _TORCH_FACTOR * self.torch_precise_max_rel)
        close = self.gradient_max_rel <= GRADIENT_TOLERANCE or self.precise_max_rel <= allowed
        return close and self.loss_max_abs_diff <= LOSS_TOLERANCE


@dataclass(frozen=True)
class _Run:
    """Three steps: losses, and the first step's clipped gradients and norm."""

    losses: tuple[float, ...]
    gradients: tuple[FloatArray, ...]
    norm: float


def check_gradients(model: Classifier, graph: bytes, settings: StepSettings, seed: int = 0) -> StepParity:
    """Compare a train-step graph with torch's autograd, clipping and SGD on random images.

    Where a value falls on the kink of a ReLU, the two may round to different sides and differ by a whole
    element, which is no fault of the graph. A wrong graph is wrong on all data, such a coincidence on one
    batch in many: up to three batches are tried and the closest one is reported.

    Args:
        model: what the graph was made of; left as it is.
        graph: the serialised ONNX model.
        settings: the settings it was made with.
        seed: decides images, labels, sample weights and the point at which gradients are compared.

    Raises:
        ExportError: the graph cannot be run, or all batches are beyond the tolerances.
    """
    session = _open(graph)
    best = StepParity(*[float("inf")] * 4)
    for draw in range(_DRAWS):
        rng = np.random.default_rng([seed, draw])
        parity = _compare(model, session, settings, rng)
        if parity.passes:
            return parity
        if parity.gradient_max_rel < best.gradient_max_rel:
            best = parity
    raise ExportError(
        "the train-step graph does not do what torch does",
        why=f"gradients differ by {best.gradient_max_rel:.1e} (allowed {GRADIENT_TOLERANCE:.0e}), "
        f"losses by {best.loss_max_abs_diff:.1e} (allowed {LOSS_TOLERANCE:.0e})",
        next_step="train fewer parameters, and report this model",
    )


def _open(graph: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no base class of their own
        raise ExportError("onnxruntime cannot load the train-step graph", why=str(error)) from error


def _compare(model: Classifier, session: Any, settings: StepSettings, rng: np.random.Generator) -> StepParity:
    start = _start_values(model, settings.parameters, rng)
    x, y = _batch(model.head.out_features, settings, rng)
    ours = _run_graph(session, settings, start, x, y)
    single = _run_torch(model, settings, start, x, y)
    apart = _apart(ours, single)
    double = single if apart <= GRADIENT_TOLERANCE else _run_torch(copy.deepcopy(model).double(), settings, start, x, y)
    return StepParity(
        gradient_max_rel=apart,
        loss_max_abs_diff=float(np.max(np.abs(np.subtract(ours.losses, single.losses)))),
        precise_max_rel=_apart(ours, double),
        torch_precise_max_rel=_apart(single, double),
    )


def _apart(ours: _Run, reference: _Run) -> float:
    norms_apart = abs(ours.norm - reference.norm) / max(reference.norm, _TINY)
    return float(np.max([relative_gap(ours.gradients, reference.gradients), norms_apart]))


def _start_values(model: Classifier, names: Sequence[str], rng: np.random.Generator) -> dict[str, FloatArray]:
    """The trained parameters, shaken: a head that is still zero would hide every gradient below it."""
    known = dict(model.named_parameters())
    start = {}
    for name in names:
        value = known[name].detach().numpy()
        scale = 0.1 * float(np.sqrt(np.mean(value**2))) or 0.1 / np.sqrt(value.shape[-1])
        start[name] = (value + scale * rng.standard_normal(value.shape)).astype(np.float32)
    return start


def _batch(classes: int, settings: StepSettings, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Random images; one-hot rows with unequal sample weights, one of them 0 where there is room."""
    x = rng.standard_normal((settings.batch, *settings.example_shape)).astype(np.float32)
    y = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=settings.batch)]
    weights = rng.uniform(0.5, 1.5, size=settings.batch).astype(np.float32)
    weights[1:2] = 0.0
    return x, y * weights[:, None]


def _run_graph(
    session: Any, settings: StepSettings, start: dict[str, FloatArray], x: FloatArray, y: FloatArray
) -> _Run:
    state = {**start, **{f"momentum.{name}": np.zeros_like(value) for name, value in start.items()}}
    batch = {"x": x, "y": y, "lr": np.asarray(_LEARNING_RATE, dtype=np.float32)}
    losses: list[float] = []
    gradients: tuple[FloatArray, ...] = ()
    norm = 0.0
    for step in range(_STEPS):
        results = dict(zip(settings.outputs, session.run(settings.outputs, {**batch, **state}), strict=True))
        losses.append(float(results["loss"]))
        if step == 0:  # from momentum 0, the new momentum is the clipped gradient
            gradients = tuple(results[f"new.momentum.{name}"] for name in settings.parameters)
            norm = float(results["gradient_norm"])
        state = {name: results[f"new.{name}"] for name in settings.state}
    return _Run(tuple(losses), gradients, norm)


def _run_torch(
    model: Classifier, settings: StepSettings, start: dict[str, FloatArray], x: FloatArray, y: FloatArray
) -> _Run:
    twin = copy.deepcopy(model).requires_grad_(False)
    known = dict(twin.named_parameters())
    trained = [known[name] for name in settings.parameters]
    for name, parameter in zip(settings.parameters, trained, strict=True):
        parameter.copy_(torch.from_numpy(start[name]))
        parameter.requires_grad_()
    optimiser = torch.optim.SGD(trained, lr=_LEARNING_RATE, momentum=settings.momentum)
    images, labels = (torch.from_numpy(value).to(trained[0].dtype) for value in (x, y))
    losses: list[float] = []
    gradients: tuple[FloatArray, ...] = ()
    norm = 0.0
    for step in range(_STEPS):
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(twin(images), labels, reduction="sum") / labels.sum()
            found = torch.autograd.grad(loss, trained)
        for parameter, gradient in zip(trained, found, strict=True):
            parameter.grad = gradient.clone()
        length = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        losses.append(float(loss.detach()))
        if step == 0:
            norm = float(length)
            gradients = tuple(p.grad.numpy().copy() for p in trained if p.grad is not None)
        optimiser.step()
    return _Run(tuple(losses), gradients, norm)


def relative_gap(ours: Sequence[FloatArray], reference: Sequence[FloatArray]) -> float:
    """How far gradients are apart, as ``StepParity.gradient_max_rel`` has it."""
    largest = [float(np.max(np.abs(value))) for value in reference]
    floor = max(_NEGLIGIBLE * max(largest), _TINY)
    apart = [float(np.max(np.abs(a - b))) for a, b in zip(ours, reference, strict=True)]
    return float(np.max([gap / max(size, floor) for gap, size in zip(apart, largest, strict=True)]))
