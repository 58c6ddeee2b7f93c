"""Writes in place: whether somebody else sees them, and the same graph without them."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import fx

_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
_MAY_SHARE = _DROPOUTS | {"type_as"}
"""Operators whose schema promises new memory, though some calls give back their first argument."""

_BATCH_NORMS = frozenset(
    {
        torch.ops.aten._native_batch_norm_legit_no_training.default,
        torch.ops.aten._native_batch_norm_legit.no_stats,
    }
)


def others_see_writes(graph: fx.Graph) -> bool:
    """Whether an operator writes to memory that something reads later, but not through the operator's result.

    Such are a view of what was written (``y[:, 0] = 0``), an input of the program, and a tensor of the model. A
    graph without them, such as a chain of in-place activations, can be treated as if nothing were written.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    owners: dict[fx.Node, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        source = _memory_of(node)
        owners[node] = node if source is None else owners[source]
        sharing[owners[node]].append(node)
        for written in _written(node):
            owner = owners[written]
            if owner.op in ("placeholder", "get_attr"):
                return True
            users = (user for view in sharing[owner] if view is not node for user in view.users)
            if any(places[user] > places[node] for user in users):
                return True
    return False


def without_writes(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The exported program in operators that write nothing.

    The exporter takes some operators apart on the way. They are put together again: batch normalisations, and
    reshapes, which it makes views as the example's strides allow.
    """
    for node in list(exported.graph.nodes):
        if _name(node) in _DROPOUTS and node.args[-1] is False and "output" not in {user.op for user in node.users}:
            node.replace_all_uses_with(node.args[0])  # the exporter takes it for a copy, and loses writes to it
            exported.graph.erase_node(node)
    module: fx.GraphModule = exported.run_decompositions({}).module()
    for node in list(module.graph.nodes):
        if node.target in _BATCH_NORMS:
            _join_batch_norm(module.graph, node)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    return module


def _join_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Put the one operator in place of the one that also gives the statistics, which nothing reads."""
    values, *_ = [user for user in node.users if user.args[1] == 0]
    source, weight, bias, *statistics = node.args
    mean, variance = statistics[:2] if len(statistics) > 3 else (None, None)
    with graph.inserting_before(node):
        joined = graph.call_function(
            torch.ops.aten.batch_norm.default,
            (source, weight, bias, mean, variance, mean is None, *statistics[-2:], False),
        )
    joined.meta = values.meta
    values.replace_all_uses_with(joined)


def _memory_of(node: fx.Node) -> fx.Node | None:
    """The node whose memory ``node`` may be a view of."""
    first = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return first if isinstance(first, fx.Node) else None
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    if any(result.alias_info is not None for result in schema.returns):
        return next(_tensors(node, writes_only=False), None)
    return first if _name(node) in _MAY_SHARE and isinstance(first, fx.Node) else None


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.rpartition(":")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _written(node: fx.Node) -> Iterator[fx.Node]:
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        yield from _tensors(node, writes_only=True)


def _tensors(node: fx.Node, *, writes_only: bool) -> Iterator[fx.Node]:
    """Arguments that the operator's schema marks as shared with its results, or only those it writes to."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        alias = argument.alias_info
        if isinstance(value, fx.Node) and alias is not None and (alias.is_write or not writes_only):
            yield value
