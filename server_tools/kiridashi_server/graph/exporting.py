"""From a module to a plain graph: batches left open, writes and regions without gradients made plain, no guards."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kiridashi_server.graph.errors import GraphError
from kiridashi_server.graph.nodes import arguments, operator_name, set_argument
from kiridashi_server.graph.regions import inline_regions
from kiridashi_server.graph.writes import others_see_writes, without_writes

_GUARDS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"})
_EQUAL_SPLITS = frozenset({"chunk", "split", "tensor_split"})
_RESHAPES = frozenset({"view", "reshape", "_unsafe_view"})


def export(model: nn.Module, examples: tuple[Tensor, ...], *, dynamic_batch: bool) -> fx.GraphModule:
    """The graph of ``model`` for these inputs, as the exporter names everything; it raises what the exporter raises.

    Args:
        model: in evaluation mode; the exporter may leave marks on it.
        examples: the inputs, with a batch first.
        dynamic_batch: whether the first size of the first input, and of all that share it, stays open.
    """
    shown, shapes = _with_batch(model, examples) if dynamic_batch else (examples, None)
    exported = torch.export.export(model, shown, dynamic_shapes=shapes)
    module = exported.module()
    if others_see_writes(module.graph):
        module = without_writes(exported)
    inline_regions(module)
    return module


def _with_batch(model: nn.Module, examples: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The inputs as they are shown to the exporter, and which of their sizes vary."""
    batch = examples[0].shape[0]
    varies = [example.dim() > 0 and example.shape[0] == batch for example in examples]
    # The exporter treats sizes 0 and 1 as constants, so a batch that shall vary is shown as two.
    shown = tuple(
        torch.cat([example, example]) if vary and batch == 1 else example
        for example, vary in zip(examples, varies, strict=True)
    )
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if vary else None for vary in varies)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(shapes)
    if named < len(shapes):  # the exporter wants those of ``*inputs`` together
        return shown, (*shapes[:named], shapes[named:])
    return shown, shapes


def plain(exported: fx.GraphModule, name: str) -> fx.GraphModule:
    """A graph module that is called like a function: no pytree codes, guards or unused tensors."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        wanted = node.users or node.op in ("placeholder", "output")
        if node.op == "call_module" or operator_name(node) in _GUARDS or not wanted:
            continue  # the exporter's guards on sizes and types, and what nothing reads
        if node.op == "output":
            graph.output(fx.map_arg(_single_output(node.args[0], exported, name), copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            _name_sizes(copies[node])
            _infer_size(copies[node])
    graph.eliminate_dead_code()
    graph.lint()
    program = fx.GraphModule(exported, graph, class_name="Program")
    program.train(False)
    return program


def _name_sizes(node: fx.Node) -> None:
    """Turn a split into equal parts into one that names its sizes, so that parts may differ after a cut."""
    if operator_name(node) not in _EQUAL_SPLITS or "dim" not in arguments(node):
        return
    axis = arguments(node)["dim"]
    sizes = [part.shape[axis] for part in node.meta["val"]]
    if all(isinstance(size, int) for size in sizes):
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, axis), {}


def _infer_size(node: fx.Node) -> None:
    """Let a reshape infer the one size that the graph computes from the batch, so that a cut need not know how."""
    if operator_name(node) not in _RESHAPES:
        return
    argument = "size" if "size" in arguments(node) else "shape"
    sizes = list(arguments(node)[argument])
    computed = [position for position, size in enumerate(sizes) if isinstance(size, fx.Node)]
    if len(computed) == 1 and -1 not in sizes:
        sizes[computed[0]] = -1
        set_argument(node, argument, sizes)


def _single_output(leaves: Any, exported: fx.GraphModule, name: str) -> Any:
    """The output as the model gave it: one tensor, or a flat tuple of tensors."""
    spec = exported._out_spec
    if spec is None:
        raise GraphError(f"{name} was exported without a description of its output")
    output = pytree.tree_unflatten(leaves, spec)
    if isinstance(output, list):
        output = tuple(output)
    if isinstance(output, fx.Node) or (isinstance(output, tuple) and all(isinstance(one, fx.Node) for one in output)):
        return output
    raise GraphError(
        f"{name} returns {'no tensor' if spec.is_leaf() else 'a ' + type(output).__name__}",
        why="a program returns a tensor or a tuple of nothing but tensors",
        next_step="wrap the model in a module whose forward returns the tensor that is wanted",
    )
