"""The exported program: how a model enters, and the few things every pass needs of it.

A *program* is a plain ``torch.fx.GraphModule`` of aten operators; its inputs are tensors. Its parameters
and buffers keep the names they had in the model, so everything else (layout, plan, scores) can speak of
``features.3.conv.weight`` and never of the model's Python class.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from kiridashi_server.graph.errors import GraphError
from kiridashi_server.graph.exporting import export, plain
from kiridashi_server.graph.nodes import arguments, operator_name, set_argument
from kiridashi_server.graph.stepwise import Program

__all__ = [
    "arguments",
    "assemble",
    "capture",
    "change_tensors",
    "copy_graph",
    "copy_program",
    "finish",
    "operator_name",
    "set_argument",
    "set_tensor",
    "tensor_names",
    "tensor_of",
    "tensors_of",
    "weight_names",
]

_CONSTANT = re.compile(r"(lifted_tensor_|_tensor_constant)\d+$")


def capture(module: nn.Module, example: Tensor | Sequence[Tensor], *, dynamic_batch: bool = True) -> fx.GraphModule:
    """Export ``module`` in evaluation mode as a program.

    Args:
        module: any module that takes tensors and gives a tensor, or a tuple or list of tensors. It is
            copied first and stays as it is, mode and parameters included.
        example: an input, the batch first, or all inputs in order; it decides all other sizes, dtypes and
            devices.
        dynamic_batch: whether the program takes any batch size, or only the example's. Of several inputs
            those vary whose first size is that of the first input.

    Returns:
        A program whose parameters and buffers have the model's names; those it never reads are left out. It
        changes nothing outside itself: state that the model updates as it runs has the captured value in every
        run.

    Raises:
        GraphError: an example is no tensor, ``torch.export`` cannot follow the model, or the model's output is
            no tensor.
    """
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    if wrong := [type(given).__name__ for given in examples if not isinstance(given, Tensor)]:
        raise GraphError(
            f"the example inputs hold a {wrong[0]}",
            why="a program takes tensors, each in a place of its own",
            next_step="wrap the model in a module whose forward takes tensors",
        )
    first = examples[0] if examples else torch.empty(0)
    if first.dim() < 1 or first.shape[0] < 1:
        raise GraphError(
            f"the example input has shape {tuple(first.shape)}",
            why="its first dimension must be a batch of at least one",
            next_step="pass an example such as torch.zeros(1, 3, 224, 224)",
        )
    model = _copy(module).eval()
    # The exporter leaves marks on the tensors it is shown; the caller's shall not have them.
    examples = tuple(given.detach() for given in examples)
    try:
        exported = export(model, examples, dynamic_batch=dynamic_batch)
    except Exception as error:  # the exporter raises errors of many unrelated classes
        raise GraphError(
            f"{type(module).__name__} cannot be exported",
            why=f"{type(error).__name__}: {_first_line(error)}",
            next_step="try torch.export.export(model.eval(), (example,)) for the full report"
            + (", or capture it with dynamic_batch=False" if dynamic_batch else ""),
        ) from error
    return plain(exported, type(module).__name__)


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # what a module holds may refuse to be copied for reasons of its own
        raise GraphError(
            f"{type(module).__name__} cannot be copied",
            why=f"{type(error).__name__}: {_first_line(error)}",
            next_step="capture it before it runs, or run it under torch.no_grad(): some models keep results",
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def copy_program(program: fx.GraphModule) -> fx.GraphModule:
    """An independent copy: own parameters and buffers, own graph, same node names."""
    return assemble(program, copy_graph(program), change_tensors(program, lambda name, tensor: tensor))


def copy_graph(program: fx.GraphModule) -> fx.Graph:
    """The program's graph again: own nodes of the same names, their traced values shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], copies.__getitem__))
            break
        # Arguments are set afterwards: a graph that is given them at once looks through them for symbols.
        copies[node] = own = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        if node.args:
            own.args = fx.map_arg(node.args, copies.__getitem__)
        if node.kwargs:
            own.kwargs = fx.map_arg(node.kwargs, copies.__getitem__)
        own.meta.update(node.meta)
    return graph


def change_tensors(program: fx.GraphModule, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The program's tensors by name, in the order of first mention, after ``change``; copies where it keeps them.

    ``change`` is given the values alone, without a gradient. What is a parameter stays one, with its
    ``requires_grad``; a tensor under two names stays one tensor, and is changed once.
    """
    own: dict[int, Tensor] = {}
    changed: dict[str, Tensor] = {}
    for name, tensor in tensors_of(program).items():
        if id(tensor) not in own:
            value = change(name, tensor.detach())
            value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
            own[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        changed[name] = own[id(tensor)]
    return changed


def assemble(source: fx.GraphModule, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A program of ``graph`` and these tensors, all else as in ``source``.

    Bodies of conditions and the like, which hold no tensors, are shared with ``source``.
    """
    program = Program(nn.Module(), fx.Graph(), class_name="Program")
    owners: dict[str, nn.Module] = {"": program}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        _register(_owner(owners, path), leaf, tensor)
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in tensors and isinstance(body := attrgetter(node.target)(source), nn.Module):
            program.add_submodule(node.target, body)
    program.graph = graph
    for owner in owners.values():
        owner.training = source.training
    return program


def _owner(owners: dict[str, nn.Module], path: str) -> nn.Module:
    """The module at ``path``, made on the way down if it is new."""
    if path not in owners:
        above, _, leaf = path.rpartition(".")
        owners[path] = nn.Module()
        _owner(owners, above).add_module(leaf, owners[path])
    return owners[path]


def _register(owner: nn.Module, leaf: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def tensor_of(program: fx.GraphModule, name: str) -> Tensor:
    """The parameter, buffer or constant called ``name``.

    Raises:
        GraphError: the program has no tensor of that name.
    """
    value: Any = program
    for part in name.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor):
        raise GraphError(
            f"the program has no tensor called {name!r}",
            next_step="compare with dict(program.named_parameters()) and dict(program.named_buffers())",
        )
    return value


def set_tensor(program: fx.GraphModule, name: str, value: Tensor) -> None:
    """Put ``value`` in the place called ``name``: as a parameter if it is one, else as a buffer.

    Modules on the way are created when they are missing, so a new ``<prefix>.bias`` can be added.
    """
    path, _, leaf = name.rpartition(".")
    owner: nn.Module = program
    for part in path.split(".") if path else ():
        child = getattr(owner, part, None)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    _register(owner, leaf, value)


def tensors_of(program: fx.GraphModule) -> dict[str, Tensor]:
    """All tensors the graph reads by name, in the order of first mention."""
    return {name: value for name, value in _attributes(program).items() if isinstance(value, Tensor)}


def tensor_names(program: fx.GraphModule) -> tuple[str, ...]:
    """Names of all tensors the graph reads, in the order of first mention, each once."""
    return tuple(tensors_of(program))


def weight_names(program: fx.GraphModule) -> tuple[str, ...]:
    """:func:`tensor_names` without the constants of the model's code, whose names the exporter makes up."""
    return tuple(name for name in tensor_names(program) if not _CONSTANT.match(name.rpartition(".")[2]))


def _attributes(program: fx.GraphModule) -> dict[str, Any]:
    """What the graph reads of its module: tensors, and the bodies of conditions and the like."""
    found: dict[str, Any] = {"": program}

    def read(name: str) -> Any:
        if name not in found:
            path, _, leaf = name.rpartition(".")
            found[name] = getattr(read(path), leaf)
        return found[name]

    return {name: read(name) for name in [str(node.target) for node in program.graph.find_nodes(op="get_attr")]}


def finish(program: fx.GraphModule) -> fx.GraphModule:
    """Close an edit: drop what nothing reads any more, check the graph, generate its code."""
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.delete_all_unused_submodules()
    _drop_unread_tensors(program)
    program.recompile()
    return program


def _drop_unread_tensors(program: fx.GraphModule) -> None:
    read = set(tensor_names(program))
    for prefix, owner in list(program.named_modules()):
        for leaf in [*owner._parameters, *owner._buffers]:
            if f"{prefix}.{leaf}".lstrip(".") not in read:
                delattr(owner, leaf)
