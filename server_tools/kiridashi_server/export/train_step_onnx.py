"""From a traced train step to an ONNX model."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.train_step_emitter import Call, Emitter, Names, Output, traced
from kiridashi_server.export.train_step_layout import out_of_place
from kiridashi_server.export.train_step_operators import CONVERTERS
from kiridashi_server.graph.program import arguments, tensor_of

_SMALL = 4096
"""How many elements a value may have that is stored rather than computed in the graph."""


def to_onnx(
    program: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str], weights: Mapping[str, Tensor]
) -> Any:
    """The ONNX model of a traced program; the same program gives the same bytes.

    Args:
        program: as ``trace_step`` gives it; all its inputs and results are float32.
        inputs: a name for each placeholder, in order.
        outputs: a name for each result, in order.
        weights: tensors that the program may hold as constants, by the names they shall have in the file.

    Raises:
        ExportError: an operator has no translation; the message names it.
    """
    emitter = Emitter()
    names: dict[fx.Node, Names] = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    names.update(zip(placeholders, inputs, strict=True))
    known = {id(tensor): name for name, tensor in weights.items()}
    computed: dict[fx.Node, Tensor] = {}
    results: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = tensor_of(program, str(node.target))
            name = known.get(id(tensor), str(node.target))
            names[node] = emitter.initializer(name, tensor.detach().cpu().numpy())
        elif node.op == "call_function":
            value = _computed(node, computed)
            names[node] = _convert(emitter, node, names) if value is None else emitter.constant(value.numpy())
        elif node.op == "output":
            results = list(node.args[0])
    shapes = {name: tuple(traced(node).shape) for node, name in zip(placeholders, inputs, strict=True)}
    return emitter.build(
        shapes,
        {
            name: Output(str(names[node]), tuple(traced(node).shape))
            for name, node in zip(outputs, results, strict=True)
        },
    )


def _computed(node: fx.Node, computed: dict[fx.Node, Tensor]) -> Tensor | None:
    """The value of a call that depends on no input and no weight, such as the indices behind a mask, if it is small."""
    if any(source not in computed for source in node.all_input_nodes) or traced(node).numel() > _SMALL:
        return None
    arguments = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
    value: Tensor = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
    computed[node] = value.contiguous()
    return computed[node]


def _convert(emitter: Emitter, node: fx.Node, names: Mapping[fx.Node, Names]) -> Names:
    if node.target is operator.getitem:
        source, index = node.args
        return names[source][index]  # type: ignore[index]
    converter = CONVERTERS.get(out_of_place(node.target))  # later readers read the changed value: tracing saw to it
    if converter is None:
        raise ExportError(
            f"the operator '{node.target}' has no translation into a train step",
            why="the model uses an operator that the train-step export does not know",
            next_step="train fewer parameters (fewer layers are differentiated then), or use another backbone",
        )
    return converter(Call(emitter, node, arguments(node), names))
