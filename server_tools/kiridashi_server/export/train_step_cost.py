"""What a train-step graph will cost a device, estimated from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import shape_inference

NODE_BYTES = 15 * 1024
"""What onnxruntime 1.32 holds for each node of a loaded graph, measured on graphs of 500 to 2200 nodes."""
_VIEWS = frozenset({"Reshape", "Identity", "Squeeze", "Unsqueeze"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


@dataclass(frozen=True)
class StepCost:
    """An iteration's cost.

    Attributes:
        peak_bytes: the most that weights, momenta and values under way take together, if every value is freed after
            its last reader, and what the runtime needs to know a node. Allocators keep more.
        macs: multiply-accumulates of products and convolutions.
        moved_bytes: what all other operators read and write.
    """

    peak_bytes: int
    macs: int
    moved_bytes: int


def step_cost(proto: Any) -> StepCost:
    """The cost of one run of a train-step graph whose sizes are all fixed; its weights lie inside it."""
    graph = shape_inference.infer_shapes(proto).graph
    sizes = {value.name: _sizes(value) for value in (*graph.input, *graph.output, *graph.value_info)}
    sizes |= {value.name: tuple(value.dims) for value in graph.initializer}
    fixed = sum(4 * math.prod(sizes[value.name]) for value in (*graph.input, *graph.initializer))
    macs = moved = 0
    for node in graph.node:
        if node.op_type in _PRODUCTS or node.op_type in _CONVOLUTIONS:
            macs += _macs(node, sizes)
        elif node.op_type not in _VIEWS:
            moved += sum(4 * math.prod(sizes.get(name, ())) for name in (*node.input, *node.output) if name)
    return StepCost(fixed + _most_alive(graph, sizes) + NODE_BYTES * len(graph.node), macs, moved)


def _most_alive(graph: Any, sizes: Mapping[str, tuple[int, ...]]) -> int:
    """The most bytes of computed values that are needed at the same time, in the order of the file."""
    root: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _VIEWS:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
    kept = {root.get(value.name, value.name) for value in graph.output}
    last: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        last.update({root.get(name, name): place for name in node.input})
    alive: dict[str, int] = {}
    most = 0
    for place, node in enumerate(graph.node):
        if node.op_type not in _VIEWS:
            alive |= {name: 4 * math.prod(sizes.get(name, ())) for name in node.output if name}
        most = max(most, sum(alive.values()))
        for name in {root.get(name, name) for name in (*node.input, *node.output)}:
            if last.get(name, -1) <= place and name not in kept:
                alive.pop(name, None)
    return most


def _macs(node: Any, sizes: Mapping[str, tuple[int, ...]]) -> int:
    first, second, result = (sizes.get(name, ()) for name in (*node.input[:2], node.output[0]))
    if node.op_type in _CONVOLUTIONS:
        reached = first if node.op_type == "ConvTranspose" else result
        return math.prod(reached) * math.prod(second[1:])
    transposed = any(one.name == "transA" and one.i for one in node.attribute)
    inner = first[-2 if transposed else -1] if first else 1
    return math.prod(result) * inner


def _sizes(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(extent.dim_value for extent in value.type.tensor_type.shape.dim)
