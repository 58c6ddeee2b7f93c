"""Loss, gradients, clipping and update of a classifier as one traced program of aten operators.

With p = log softmax of the logits and sample weights w_i = sum of row i of y:

    loss = - sum(y p) / sum(y)                       (mean cross-entropy; 0 for a batch of weight 0)
    g    = gradient of loss by the trained parameters
    c    = clip_norm / max(||g||, clip_norm)         (one norm over all of them)
    m'   = momentum m + c g
    v'   = v - lr m'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.train_step_layout import channels_outside
from kiridashi_server.export.train_step_operators import CONVERTERS
from kiridashi_server.graph.program import arguments, operator_name, set_argument

_SMALLEST_WEIGHT = 1e-12


@dataclass(frozen=True)
class StepSettings:
    """What a train step is, beside the model.

    Attributes:
        example_shape: sizes of one preprocessed image, (channels, height, width).
        parameters: names of the trained parameters, in the order of the graph's inputs.
        batch: images per step.
        clip_norm: largest norm that the gradients may have together; longer ones are shortened to it.
        momentum: share of the last update that is kept, in [0, 1).
    """

    example_shape: tuple[int, int, int]
    parameters: tuple[str, ...]
    batch: int
    clip_norm: float
    momentum: float

    @property
    def state(self) -> tuple[str, ...]:
        """What a step takes and gives back: the trained parameters, then their momenta."""
        return (*self.parameters, *(f"momentum.{name}" for name in self.parameters))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The graph's inputs in order."""
        return ("x", "y", "lr", *self.state)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The graph's outputs in order."""
        return ("loss", *(f"new.{name}" for name in self.state), "gradient_norm")


@dataclass(frozen=True)
class TracedStep:
    """A train step as a program of aten operators.

    Attributes:
        program: placeholders x, y, lr, the trained parameters, their momenta; results loss [], new parameters,
            new momenta, norm of the gradients before clipping [].
        frozen: the tensors that are not trained, by name; those that the step reads are constants of the program.
    """

    program: fx.GraphModule
    frozen: Mapping[str, Tensor]


def trace_step(model: Classifier, settings: StepSettings) -> TracedStep:
    """Trace one step on zeros; nothing below the lowest trained parameter is differentiated.

    Raises:
        ExportError: a trained parameter has no influence on the loss, or torch cannot trace the model.
    """
    frozen = {name: value.detach() for name, value in model.named_parameters()}
    frozen |= {name: value.detach() for name, value in model.named_buffers()}
    prefix = "features."
    inside = {name.removeprefix(prefix) for name in settings.parameters if name.startswith(prefix)}
    lean = Classifier(channels_outside(fold_padding(model.features), inside), model.head)
    trained = [frozen.pop(name) for name in settings.parameters]
    x = torch.zeros(settings.batch, *settings.example_shape)
    y = torch.full((settings.batch, model.head.out_features), 1.0 / model.head.out_features)
    step = _step_function(lean, frozen, settings)
    rules = {**core_aten_decompositions(), **get_decompositions([torch.ops.aten.native_batch_norm])}
    taken_apart = {op: rule for op, rule in rules.items() if op not in CONVERTERS}
    values = [value.clone().requires_grad_() for value in trained]
    momenta = [torch.zeros_like(value) for value in trained]
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            program = make_fx(step, decomposition_table=taken_apart)(x, y, torch.zeros(()), values, momenta)
    except (RuntimeError, NotImplementedError) as error:
        raise ExportError(
            "the train step of this model cannot be traced",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            next_step="check that the loss depends on every trained parameter: " + ", ".join(settings.parameters),
        ) from error
    program.graph.eliminate_dead_code()
    program.recompile()
    return TracedStep(program, frozen)


def _step_function(model: Classifier, frozen: dict[str, Tensor], settings: StepSettings) -> Callable[..., list[Tensor]]:
    def step(x: Tensor, y: Tensor, rate: Tensor, values: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[Tensor]:
        tensors = {**frozen, **dict(zip(settings.parameters, values, strict=True))}
        logits: Tensor = functional_call(model, tensors, (x,))
        weight = y.sum().clamp(min=_SMALLEST_WEIGHT)
        loss = -(torch.log_softmax(logits, 1) * y).sum() / weight
        # Tensors with trailing axes of size one are an order of magnitude slower in onnxruntime's
        # elementwise kernels, so the update works on flat vectors; reshaping costs nothing.
        gradients = [gradient.reshape(-1) for gradient in torch.autograd.grad(loss, list(values))]
        with torch.no_grad():
            norm = sum((torch.dot(gradient, gradient) for gradient in gradients), torch.zeros(())).sqrt()
            shrink = settings.clip_norm / norm.clamp(min=settings.clip_norm)
            flat = [settings.momentum * m.reshape(-1) + shrink * g for m, g in zip(momenta, gradients, strict=True)]
            moved = [v.reshape(-1) - rate * m for v, m in zip(values, flat, strict=True)]
        shapes = [value.shape for value in values]
        new_values = [new.reshape(shape) for new, shape in zip(moved, shapes, strict=True)]
        new_momenta = [new.reshape(shape) for new, shape in zip(flat, shapes, strict=True)]
        return [loss.detach(), *new_values, *new_momenta, norm]

    return step


def fold_padding(program: fx.GraphModule) -> fx.GraphModule:
    """The same program, its weights shared, with even zero padding taken into the convolution that reads it.

    Otherwise the backward pass would crop what it had padded, one more copy of every feature map.
    """
    graph = fx.Graph()
    output = graph.graph_copy(program.graph, {})
    graph.output(output)
    for node in list(graph.nodes):
        if operator_name(node) == "conv2d":
            _fold_pad_of(node)
    graph.eliminate_dead_code()
    return fx.GraphModule(program, graph)


def _fold_pad_of(convolution: fx.Node) -> None:
    pad = arguments(convolution)["input"]
    if not isinstance(pad, fx.Node) or operator_name(pad) not in ("pad", "constant_pad_nd"):
        return
    values = arguments(pad)
    amounts: list[Any] = list(values["pad"])
    if values.get("mode", "constant") != "constant" or values["value"] or len(amounts) != 4:
        return
    if not all(isinstance(amount, int) for amount in amounts):
        return
    left, right, top, bottom = amounts
    padding = arguments(convolution)["padding"]
    if left != right or top != bottom or min(amounts) < 0 or not isinstance(padding, (list, tuple)):
        return
    rows, columns = padding if len(padding) == 2 else (padding[0], padding[0])
    set_argument(convolution, "input", values["self"])
    set_argument(convolution, "padding", [rows + top, columns + left])
