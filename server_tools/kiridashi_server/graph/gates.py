"""Gates: one factor for each unit, applied where operators read the unit.

A gate of zero is then exactly a removed unit: what lies between the place where a channel is made and the
place where it is read (bias, normalisation, activation) cannot turn the zero into something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kiridashi_server.graph.dims import Atom, Dim, is_frozen, resolve, size_of
from kiridashi_server.graph.errors import GraphError
from kiridashi_server.graph.masked_norms import MASKED_NORMS
from kiridashi_server.graph.nodes import arguments, operator_name, set_argument
from kiridashi_server.graph.program import copy_program
from kiridashi_server.graph.rules import Read
from kiridashi_server.graph.tracker import OUTPUT, Tracking


class Gated(nn.Module):
    """A program with gates; made by :func:`insert_gates`.

    Attributes:
        graph_module: the program's copy, which takes the inputs and one gate vector for each distinct
            dimension that is read.
        sizes: number of units by group name.
    """

    def __init__(self, graph_module: fx.GraphModule, tracking: Tracking, dims: Sequence[Dim]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.sizes = dict(tracking.layout.sizes)
        self._names = tracking.names
        self._dims = tuple(dims)

    def forward(self, x: Tensor | tuple[Tensor, ...], gates: Mapping[str, Tensor]) -> Tensor:
        """The program's output for ``x`` with every unit multiplied by its gate.

        Args:
            x: an input batch; of a program with several inputs, a tuple.
            gates: by group name, a vector [size] on the program's device; groups that are not named have no
                gate. Gradients reach the vectors.

        Raises:
            GraphError: an unknown group, or a vector of the wrong shape.
        """
        for name, gate in gates.items():
            if gate.shape != (self.sizes.get(name, -1),):
                raise GraphError(
                    f"the gate for group {name!r} has shape {tuple(gate.shape)}",
                    why=f"the group has {self.sizes[name]} units" if name in self.sizes else "there is no such group",
                    next_step="give one number for each unit, named as in Layout.table()",
                )
        inputs = x if isinstance(x, tuple) else (x,)
        like = next(self.graph_module.parameters(), inputs[0])  # an input may be of another dtype, such as uint8
        vectors = [self._spread(dim, gates, like) for dim in self._dims]
        result: Tensor = self.graph_module(*inputs, *vectors)
        return result

    def _spread(self, dim: Dim, gates: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The gate of every index of ``dim``: products of factors' gates, parts one after the other."""
        vector = like.new_ones(1)
        for atom in resolve(dim):
            vector = (vector[:, None] * self._factor(atom, gates, like)[None, :]).reshape(-1)
        return vector

    def _factor(self, atom: Atom, gates: Mapping[str, Tensor], like: Tensor) -> Tensor:
        if atom.pieces:
            return torch.cat([self._spread(piece, gates, like) for piece in atom.pieces])
        gate = gates.get(self._names.get(atom, ""))
        return like.new_ones(atom.size) if gate is None else gate.to(like.dtype)


def insert_gates(program: fx.GraphModule, tracking: Tracking) -> Gated:
    """A gated copy of ``program``; the program and its parameters' ``requires_grad`` stay as they are.

    With all gates one it computes what the program computes; with gates of zero, what is left after those
    units are cut. A group read in several places has its gate in each; where it is normalised, the gates are
    the weights of the statistics.
    """
    gated = copy_program(program)
    nodes = {node.name: node for node in gated.graph.nodes}
    entry = [node for node in gated.graph.nodes if node.op == "placeholder"][-1]
    vectors: dict[tuple[Atom, ...], fx.Node] = {}
    dtype = next((parameter.dtype for parameter in gated.parameters()), torch.get_default_dtype())

    def vector(dim: Dim) -> fx.Node:
        key = resolve(dim)
        if key not in vectors:
            with gated.graph.inserting_after([entry, *vectors.values()][-1]):
                vectors[key] = made = gated.graph.placeholder("gate")
                made.target = made.name  # its own, whatever the program's inputs are called
                made.meta["val"] = torch.empty(size_of(dim), dtype=dtype, device="meta")
        return vectors[key]

    for read in tracking.reads:
        if not is_frozen(read.dim):
            _multiply(gated.graph, nodes[read.node], read, vector(read.dim))
    for norm in tracking.norms:
        if not is_frozen(norm.dim):
            _weigh(gated.graph, nodes[norm.node], vector(norm.dim))
    gated.graph.lint()
    gated.recompile()
    return Gated(gated, tracking, list(vectors))


def _multiply(graph: fx.Graph, reader: fx.Node, read: Read, vector: fx.Node) -> None:
    operand: Any = reader.args[0] if read.node == OUTPUT else arguments(reader)[read.argument]
    listed = [] if read.position is None else list(operand)
    if read.position is not None:
        operand = listed[read.position]
    if not isinstance(operand, fx.Node):
        raise GraphError(f"{read.node} does not read a tensor called {read.argument}")
    with graph.inserting_before(reader):
        vector = _like(graph, vector, operand)
        if read.axis != -1:
            shape = [-1] + [1] * (-read.axis - 1)
            vector = graph.call_function(torch.ops.aten.reshape.default, (vector, shape))
        product = graph.call_function(torch.ops.aten.mul.Tensor, (operand, vector))
    if read.node == OUTPUT:
        reader.args = (product,)
    elif read.position is None:
        set_argument(reader, read.argument, product)
    else:
        listed[read.position] = product
        set_argument(reader, read.argument, listed)


def _like(graph: fx.Graph, vector: fx.Node, operand: fx.Node) -> fx.Node:
    """The gates in the type of what they multiply, where a program computes in several."""
    dtype = operand.meta["val"].dtype
    return (
        vector if vector.meta["val"].dtype == dtype else graph.call_function(torch.ops.aten.to.dtype, (vector, dtype))
    )


def _weigh(graph: fx.Graph, norm: fx.Node, vector: fx.Node) -> None:
    """Put the masked form of a normalisation in its place."""
    given = dict(arguments(norm))
    with graph.inserting_before(norm):
        vector = _like(graph, vector, given["input"])
        masked = graph.call_function(MASKED_NORMS[operator_name(norm)], (vector, given))
    masked.meta = dict(norm.meta)
    norm.replace_all_uses_with(masked)
    graph.erase_node(norm)
