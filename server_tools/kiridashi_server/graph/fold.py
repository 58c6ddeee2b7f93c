"""Fold batch normalisation into the convolution in front of it.

For a convolution ``y = W * x + b`` and a normalisation with mean ``m``, variance ``v``, scale ``g`` and
shift ``h``, the pair equals one convolution with ``W' = s W`` and ``b' = h + s (b - m)``, where
``s = g / sqrt(v + eps)`` per output channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from kiridashi_server.graph.nodes import arguments, operator_name, set_argument
from kiridashi_server.graph.program import copy_program, finish, set_tensor, tensor_of

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def fold_batch_norm(program: fx.GraphModule) -> fx.GraphModule:
    """A new program in which every foldable batch normalisation is part of its convolution.

    Foldable: in evaluation mode, with running statistics, the only reader of a convolution whose weight is
    read nowhere else. All others stay. Weights keep their names; the bias is the parameter beside the weight
    (``<prefix>.bias`` for ``<prefix>.weight``). Computed in float64, stored in the weight's dtype; a folded
    weight needs a gradient if it did before.
    """
    folded = copy_program(program)
    for node in list(folded.graph.nodes):
        if operator_name(node) == "batch_norm":
            convolution = node.args[0]
            if isinstance(convolution, fx.Node) and _foldable(folded, convolution, node):
                _fold(folded, convolution, node)
    return finish(folded)


def _foldable(program: fx.GraphModule, convolution: fx.Node, norm: fx.Node) -> bool:
    values = arguments(norm)
    if operator_name(convolution) not in _CONVOLUTIONS or len(convolution.users) != 1 or values["training"]:
        return False
    conv_values = arguments(convolution)
    weight, bias = conv_values["weight"], conv_values["bias"]
    if not _is_tensor_read(weight) or values["running_mean"] is None or values["running_var"] is None:
        return False
    if bias is not None and not (_is_tensor_read(bias) and _readers(program, bias) == 1):
        return False
    return _readers(program, weight) == 1


def _is_tensor_read(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _readers(program: fx.GraphModule, read: fx.Node) -> int:
    """How many operators read the tensor behind ``read``, under whatever name and node."""
    tensor = tensor_of(program, str(read.target))
    return sum(
        len(node.users)
        for node in program.graph.nodes
        if node.op == "get_attr" and tensor_of(program, str(node.target)) is tensor
    )


def _fold(program: fx.GraphModule, convolution: fx.Node, norm: fx.Node) -> None:
    values, conv_values = arguments(norm), arguments(convolution)
    weight_node, bias_node = conv_values["weight"], conv_values["bias"]
    weight_name = str(weight_node.target)
    weight = tensor_of(program, weight_name)

    def vector(node: fx.Node | None, default: float) -> Tensor:
        if node is None:
            return torch.full((weight.shape[0],), default, dtype=torch.float64, device=weight.device)
        return tensor_of(program, str(node.target)).detach().double()

    scale = vector(values["weight"], 1.0) / torch.sqrt(vector(values["running_var"], 1.0) + values["eps"])
    shift = vector(values["bias"], 0.0) + scale * (vector(bias_node, 0.0) - vector(values["running_mean"], 0.0))
    scaled = weight.detach().double() * scale.reshape(-1, *[1] * (weight.dim() - 1))

    bias_name = str(bias_node.target) if bias_node is not None else _bias_name(weight_name)
    set_tensor(program, weight_name, nn.Parameter(scaled.to(weight.dtype), requires_grad=weight.requires_grad))
    set_tensor(program, bias_name, nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad))
    if bias_node is None:
        with program.graph.inserting_after(weight_node):
            set_argument(convolution, "bias", _read(program.graph, bias_name, shift.to(weight.dtype)))
    norm.replace_all_uses_with(convolution)
    program.graph.erase_node(norm)


def _read(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    node = graph.get_attr(name)
    node.meta["val"] = value.to("meta")
    return node


def _bias_name(weight_name: str) -> str:
    prefix, _, leaf = weight_name.rpartition(".")
    name = "bias" if leaf == "weight" else f"{leaf}_bias"
    return f"{prefix}.{name}" if prefix else name
