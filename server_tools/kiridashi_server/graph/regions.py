"""Parts of a model under ``torch.no_grad()`` or a switched-off autocast: the exporter makes graphs of their own of
them, which are put back in place here."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_GRADIENTS = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def inline_regions(program: fx.GraphModule) -> None:
    """Put the operators of such regions where the region is called, in ``program`` itself, also nested ones.

    What comes out of a region without gradients is detached, so that training sees the same gradients as in the
    model. A region with autocast switched on stays: its operators compute in other types there.
    """
    while (region := next(filter(_is_region, program.graph.nodes), None)) is not None:
        _inline(program, region)


def _is_region(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name == _GRADIENTS or (name == _AUTOCAST and not node.args[2])


def _inline(program: fx.GraphModule, region: fx.Node) -> None:
    place, name, body = next(
        (place, str(value.target), body)
        for place, value in enumerate(region.args)
        if isinstance(value, fx.Node) and (body := _body(program, value)) is not None
    )
    detached = region.args[0] is False
    operands = region.args[place + 1 :]
    values: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    results: Any = ()
    with program.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], values.__getitem__)
            elif node.op != "placeholder":
                values[node] = program.graph.node_copy(node, values.__getitem__)
                if node.op == "get_attr":
                    values[node].target = f"{name}.{node.target}"
        results = [_detached(program.graph, value) if detached else value for value in results]
    for user in list(region.users):
        user.replace_all_uses_with(results[user.args[1]])
        program.graph.erase_node(user)
    program.graph.erase_node(region)


def _body(program: fx.GraphModule, value: fx.Node) -> fx.GraphModule | None:
    """The graph module that ``value`` reads, if it reads one."""
    if value.op != "get_attr":
        return None
    path, _, leaf = str(value.target).rpartition(".")
    found = getattr(program.get_submodule(path), leaf)
    return found if isinstance(found, fx.GraphModule) else None


def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta["val"] = value.meta["val"]
    return node
