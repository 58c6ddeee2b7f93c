"""Calls of operators in a graph: names, and arguments by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import fx


def operator_name(node: fx.Node) -> str:
    """The operator's name: ``conv2d`` for every overload of ``aten::conv2d``, ``python.mul`` for ``*``."""
    return _name_of(node.target) if node.op == "call_function" else node.op


@lru_cache(maxsize=4096)
def _name_of(target: Any) -> str:
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
    given, named = node.args, node.kwargs
    values: dict[str, Any] = dict(_defaults(node.target))
    values.update(zip(values, given, strict=False))
    values.update(named)
    return values


@lru_cache(maxsize=4096)
def _defaults(target: torch._ops.OpOverload) -> Mapping[str, Any]:
    """The operator's arguments in order with their defaults; asking the schema itself takes long."""
    return {argument.name: argument.default_value for argument in target._schema.arguments}


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace one argument of an operator call, whether it was given by place or by name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.name} is no operator call")
    names = list(_defaults(node.target))
    if name not in names:
        raise KeyError(f"{operator_name(node)} has no argument {name!r}")
    if names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)
