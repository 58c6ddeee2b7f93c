"""Calls of operators in a graph: names, and arguments by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def operator_name(node: fx.Node) -> str:
    """The operator's name: ``conv2d`` for every overload of ``aten::conv2d``, ``python.mul`` for ``*``."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    if target is operator.getitem:
        return "getitem"
    return f"python.{getattr(target, '__name__', str(target))}"


def has_operator(program: fx.GraphModule, name: str) -> bool:
    """Whether some node of the program is a call of this operator, named as by :func:`operator_name`."""
    return any(operator_name(node) == name for node in program.graph.nodes)


def arguments(node: fx.Node) -> Mapping[str, Any]:
    """The call's arguments by the names of the operator's schema, its defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace one argument of an operator call, whether it was given by place or by name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.name} is no operator call")
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            if position < len(node.args):
                node.update_arg(position, value)
            else:
                node.update_kwarg(name, value)
            return
    raise KeyError(f"{operator_name(node)} has no argument {name!r}")
