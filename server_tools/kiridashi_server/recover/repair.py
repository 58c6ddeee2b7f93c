"""Closed-form repair of a cut program: every consumer of a cut group is re-fitted to what the dense program made there.

A consumer is a convolution or linear layer that lost input channels. Dropping channels changes its output; part of
what the dropped ones carried can be rebuilt from those that stay. The cut program runs once over a few unlabelled
images, and at each consumer, in the order of the graph,

* ``X`` are the consumer's inputs in the *cut* program (with the drift of all layers before it, already repaired),
* ``T`` is the *dense* program's value there, after the batch normalisation or the scale of each channel
  (LayerScale); if a residual addition follows, the difference of the two programs' residual streams is added, so that
  errors before are made good here;
* ``A = W0 + R'Xc (Xc'Xc + l I)^-1`` with ``R = Tc - Xc W0'``: ridge regression that shrinks towards the cut weights
  ``W0``, scaled like ``T``, with ``l`` a multiple of the mean of ``diag(Xc'Xc)``.

The result is written back as weight and bias, or as weight, normalisation statistics and affine parameters. All other
normalisations keep the statistics of the dense model, whose values they go on seeing. Layer-wise reconstruction after
channel selection goes back to He et al. 2017 (arXiv 1707.06168); the sequential form and the shrinkage are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from kiridashi_server.graph.dims import indices
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import arguments, copy_program, operator_name, tensor_of
from kiridashi_server.graph.tracker import Tracking

DEFAULT_STRENGTH = 0.7
_TRANSPARENT = frozenset({"dropout", "dropout_", "clone", "contiguous"})


@dataclass(frozen=True)
class _Consumer:
    """A layer to re-fit: names of its node and weight, of what is behind it, and its kept outputs."""

    node: str
    weight: str
    norm: str | None
    scale: str | None
    target: str
    residual: str | None
    outputs: Tensor


@dataclass(frozen=True)
class Repaired:
    """The repaired program and how many consumers were re-fitted."""

    program: fx.GraphModule
    consumers: int


def repair(
    dense: fx.GraphModule,
    tracking: Tracking,
    plan: Plan,
    small: fx.GraphModule,
    inputs: Tensor,
    strength: float = DEFAULT_STRENGTH,
) -> Repaired:
    """Repair ``small``, which is ``dense`` cut by ``plan``.

    Args:
        dense: the dense program.
        tracking: of the dense program.
        plan: the plan that was carried out.
        small: the cut program; it is copied, not changed.
        inputs: float32 [N, 3, H, W], unlabelled images of the task; some dozens are enough.
        strength: relative ridge strength.

    Returns:
        A copy of ``small`` with new consumer weights; a normalisation behind a consumer has new statistics and affine
        parameters, all others keep theirs. Consumers without bias and normalisation behind them stay as they are.
    """
    repaired = copy_program(small)
    consumers = _consumers(dense, tracking, plan, repaired)
    wanted = {consumer.target for consumer in consumers} | {c.residual for c in consumers if c.residual}
    with torch.no_grad():
        teacher = _Recorder(dense, wanted)
        teacher.run(inputs)
        _Repairer(repaired, consumers, teacher.recorded, strength).run(inputs)
    return Repaired(repaired, len(consumers))


def _consumers(dense: fx.GraphModule, tracking: Tracking, plan: Plan, small: fx.GraphModule) -> list[_Consumer]:
    kept = {tracking.atoms[name]: np.asarray(units, dtype=np.int64) for name, units in plan.kept.items()}
    found = []
    for node in small.graph.nodes:
        if operator_name(node) not in ("conv2d", "linear"):
            continue
        values = arguments(node)
        if values.get("groups", 1) != 1 or not _is_read(values["weight"]):
            continue
        weight = str(values["weight"].target)
        if tensor_of(small, weight).shape[1] == tensor_of(dense, weight).shape[1]:
            continue
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        norm = reader if reader is not None and _is_affine_norm(reader) else None
        if norm is None and not _is_read(values["bias"]):
            continue
        scale = _scale_of(node, reader, small) if norm is None and reader is not None else None
        target = reader if reader is not None and (norm or scale) else node
        outputs = torch.from_numpy(indices(tracking.tensors[weight][0], kept))
        found.append(
            _Consumer(node.name, weight, norm.name if norm else None, scale, target.name, _residual_of(target), outputs)
        )
    return found


def _is_read(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _is_affine_norm(node: fx.Node) -> bool:
    return operator_name(node) == "batch_norm" and all(
        _is_read(arguments(node)[name]) for name in ("weight", "bias", "running_mean", "running_var")
    )


def _scale_of(node: fx.Node, reader: fx.Node, program: fx.GraphModule) -> str | None:
    """The name of the tensor with one factor for each output of ``node``, if that is what ``reader`` multiplies by."""
    if operator_name(reader) not in ("mul", "mul_"):
        return None
    values = arguments(reader)
    other = values["other"] if values["self"] is node else values["self"]
    if not _is_read(other):
        return None
    name = str(other.target)
    shape, channels = tensor_of(program, name).shape, int(_weight_of(node, program).shape[0])
    axis = 1 if operator_name(node) == "linear" else 3  # counted from the last
    return name if len(shape) >= axis and shape[-axis] == shape.numel() == channels else None


def _weight_of(node: fx.Node, program: fx.GraphModule) -> Tensor:
    return tensor_of(program, str(arguments(node)["weight"].target))


def _residual_of(node: fx.Node) -> str | None:
    """The other operand of a plain addition that is the only reader of ``node``, if it is known before it."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if operator_name(user) in _TRANSPARENT:
            node = user
            continue
        if operator_name(user) not in ("add", "add_") or arguments(user).get("alpha", 1) != 1:
            return None
        values = arguments(user)
        other = values["other"] if values["self"] is node else values["self"]
        known = isinstance(other, fx.Node) and other.op == "call_function" and other < node
        return other.name if known else None
    return None


class _Recorder(fx.Interpreter):
    """Runs a program and keeps copies of the values that are wanted."""

    def __init__(self, program: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(program)
        self.recorded: dict[str, Tensor] = {}
        self._wanted = wanted

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            # Copied, because an in-place activation behind it would change what was kept.
            self.recorded[n.name] = value.clone()
        return value


class _Repairer(_Recorder):
    """Runs the cut program, re-fitting consumers on the way."""

    def __init__(
        self, program: fx.GraphModule, consumers: list[_Consumer], teacher: Mapping[str, Tensor], strength: float
    ) -> None:
        super().__init__(program, {c.residual for c in consumers if c.residual})
        self._program = program
        self._by_node = {consumer.node: consumer for consumer in consumers}
        self._teacher = teacher
        self._strength = strength

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self._by_node:
            values = fx.map_arg(dict(arguments(n)), self.env.__getitem__)
            self._refit(self._by_node[n.name], n, values)
        return super().run_node(n)

    def _refit(self, consumer: _Consumer, node: fx.Node, values: Mapping[str, Any]) -> None:
        source: Tensor = values["input"]
        weight = tensor_of(self._program, consumer.weight)
        X = _input_rows(operator_name(node), source, values)
        T = self._target_rows(consumer, operator_name(node))
        norm = next(iter(node.users)) if consumer.norm else None
        scale = self._norm_scale(norm) if norm is not None else self._channel_scale(consumer, len(weight))
        start = scale[:, None] * weight.flatten(1).double()
        fitted, shift = _shrunk_regression(X, T, start, self._strength)
        if norm is None:
            audible = _is_audible(scale)  # what is multiplied by next to nothing cannot make good anything
            offset = tensor_of(self._program, str(arguments(node)["bias"].target))
            weight[audible] = (fitted / scale[:, None]).reshape(weight.shape)[audible].to(weight.dtype)
            offset[audible] = (shift / scale)[audible].to(offset.dtype)
            return
        weight.copy_((fitted / scale[:, None]).reshape(weight.shape))
        bias = values.get("bias")
        made = X @ (fitted / scale[:, None]).T + (0 if bias is None else bias.double())
        self._write_norm(norm, made, scale, shift if bias is None else shift - scale * bias.double())

    def _target_rows(self, consumer: _Consumer, operator: str) -> Tensor:
        outputs = consumer.outputs
        axis = 1 if operator == "conv2d" else -1
        target = self._teacher[consumer.target].index_select(axis, outputs)
        if consumer.residual is not None:
            dense_stream = self._teacher[consumer.residual].index_select(axis, outputs)
            target = target + dense_stream - self.recorded[consumer.residual]
        return _output_rows(operator, target)

    def _channel_scale(self, consumer: _Consumer, channels: int) -> Tensor:
        if consumer.scale is None:
            return torch.ones(channels, dtype=torch.float64)
        return tensor_of(self._program, consumer.scale).flatten().double()

    def _norm_scale(self, norm: fx.Node) -> Tensor:
        """gamma / sqrt(variance + eps), with 1 where a channel is all but switched off."""
        values = arguments(norm)
        gamma = tensor_of(self._program, str(values["weight"].target)).double()
        variance = tensor_of(self._program, str(values["running_var"].target)).double()
        scale = gamma / torch.sqrt(variance + values["eps"])
        return torch.where(_is_audible(scale), scale, torch.ones_like(scale))

    def _write_norm(self, norm: fx.Node, made: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Statistics of the new output z, and affine parameters with which the layer gives ``scale * z + shift``."""
        values = arguments(norm)
        mean, variance = made.mean(dim=0), made.var(dim=0)
        contents = {
            "running_mean": mean,
            "running_var": variance,
            "weight": scale * torch.sqrt(variance + values["eps"]),
            "bias": scale * mean + shift,
        }
        for name, value in contents.items():
            tensor_of(self._program, str(values[name].target)).copy_(value)


def _is_audible(scale: Tensor) -> Tensor:
    return scale.abs() > 1e-4 * scale.abs().max()


def _shrunk_regression(X: Tensor, T: Tensor, start: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights [outputs, inputs] near ``start`` and shift [outputs] with ``T ~ X weights' + shift``; all float64."""
    x_mean, t_mean = X.mean(dim=0), T.mean(dim=0)
    Xc = X - x_mean
    R = (T - t_mean) - Xc @ start.T
    gram = Xc.T @ Xc
    ridge = strength * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    gram.diagonal().add_(ridge)
    fitted = start + torch.linalg.solve(gram, Xc.T @ R).T
    return fitted, t_mean - fitted @ x_mean


def _input_rows(operator: str, source: Tensor, values: Mapping[str, Any]) -> Tensor:
    """One row of inputs for each place where the consumer's weight is applied, float64."""
    if operator == "linear":
        return source.flatten(0, -2).double()
    kernel = list(values["weight"].shape[2:])
    if kernel == [1, 1] and list(values["stride"]) == [1, 1]:
        return _output_rows(operator, source)
    columns = functional.unfold(
        source, tuple(kernel), dilation=values["dilation"], padding=values["padding"], stride=values["stride"]
    )
    return columns.transpose(1, 2).flatten(0, 1).double()


def _output_rows(operator: str, value: Tensor) -> Tensor:
    """One row of channels for each place, float64."""
    if operator == "linear":
        return value.flatten(0, -2).double()
    return value.permute(0, 2, 3, 1).flatten(0, 2).double()
