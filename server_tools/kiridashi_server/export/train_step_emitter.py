"""An ONNX graph under construction, and one operator call on its way into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx

from kiridashi_server.export.errors import ExportError

OPSET = 20
IR_VERSION = 9
"""The oldest that carries the operator set, so that older runtimes on devices read the file too."""

Names: TypeAlias = str | tuple[str, ...]
"""What a call became: the name of its ONNX value, or one name for each of its results."""


@dataclass(frozen=True)
class Output:
    """Which value a graph output takes, and its sizes."""

    value: str
    shape: tuple[int, ...]


class Emitter:
    """Collects nodes and initialisers; equal nodes and equal constants are made once.

    Names are counted per operator and depend on the order of the calls alone: the same calls give the
    same bytes.
    """

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._known: dict[tuple[object, ...], tuple[str, ...]] = {}
        self._counts: dict[str, int] = {}
        self._sources: dict[str, str] = {}

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one result and give its name; an input that is left out is an empty name."""
        return self.nodes(operator, inputs, 1, **attributes)[0]

    def nodes(self, operator: str, inputs: Sequence[str], results: int, **attributes: Any) -> tuple[str, ...]:
        """Add a node with several results and give their names."""
        settings = {key: value for key, value in sorted(attributes.items()) if value is not None}
        key = (operator, tuple(inputs), results, repr(settings))
        if key not in self._known:
            stem = self._fresh(operator.lower())
            names = (stem, *(f"{stem}.{index}" for index in range(1, results)))
            self._nodes.append(helper.make_node(operator, list(inputs), list(names), name=stem, **settings))
            self._known[key] = names
        return self._known[key]

    def reshaped(self, value: str, shape: Sequence[int]) -> str:
        """``value`` in another shape; of several reshapes in a row only the last one is made."""
        source = self._sources.get(value, value)
        name = self.node("Reshape", source, self.integers(*shape))
        self._sources[name] = source
        return name

    def constant(self, value: npt.NDArray[Any]) -> str:
        """The name of a small constant tensor."""
        key = ("constant", value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            self._known[key] = (self.initializer(self._fresh("constant"), value),)
        return self._known[key][0]

    def integers(self, *values: int) -> str:
        """The name of an int64 vector, as shapes, axes and pads are given."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def initializer(self, name: str, value: npt.NDArray[Any]) -> str:
        """Add a weight under its own name."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def build(self, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Output]) -> Any:
        """The ONNX model of everything that ``outputs`` need.

        Args:
            inputs: shape of every graph input by name, all float32.
            outputs: value and shape of every graph output by name, all float32.
        """
        closing = [
            helper.make_node("Identity", [output.value], [name], name=f"as.{name}") for name, output in outputs.items()
        ]
        nodes, read = _needed([*self._nodes, *closing], set(outputs))
        graph = helper.make_graph(
            nodes,
            "train_step",
            [_float_value(name, shape) for name, shape in inputs.items()],
            [_float_value(name, output.shape) for name, output in outputs.items()],
            [value for name, value in self._initializers.items() if name in read],
        )
        return helper.make_model(
            graph,
            producer_name="kiridashi",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )

    def _fresh(self, stem: str) -> str:
        self._counts[stem] = self._counts.get(stem, 0) + 1
        return f"{stem}_{self._counts[stem]}"


def _float_value(name: str, shape: Sequence[int]) -> Any:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))


def _needed(nodes: Sequence[Any], wanted: set[str]) -> tuple[list[Any], set[str]]:
    """The nodes that ``wanted`` needs, in order, and every name they read."""
    read = set(wanted)
    kept = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    return kept[::-1], read


@dataclass(frozen=True)
class Call:
    """One aten call, its arguments by the names of the operator's schema.

    Attributes:
        emitter: where its nodes go.
        node: the call in the traced program.
        arguments: the arguments, defaults filled in; tensors are still nodes of the traced program.
        names: what the nodes before it became.
    """

    emitter: Emitter
    node: fx.Node
    arguments: Mapping[str, Any]
    names: Mapping[fx.Node, Names]

    def value(self, argument: str) -> str:
        """The ONNX name of a tensor argument; a Python number becomes a constant of the result's type."""
        given = self.arguments[argument]
        if isinstance(given, fx.Node):
            return self.named(given)
        return self.number(given, self._number_type())

    def named(self, node: fx.Node) -> str:
        """The ONNX name of another node's only result."""
        name = self.names[node]
        if not isinstance(name, str):
            raise ExportError(f"the results of '{node.target}' are used as if they were one tensor")
        return name

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> str:
        """The name of a scalar constant."""
        return self.emitter.constant(np.asarray(value, dtype=numpy_dtype(dtype)))

    def tensor(self, argument: str) -> torch.Tensor:
        """Shape and dtype of a tensor argument, as traced."""
        return traced(self.arguments[argument])

    def shape(self, argument: str) -> tuple[int, ...]:
        """The sizes of a tensor argument."""
        return tuple(int(size) for size in self.tensor(argument).shape)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The sizes of the call's only result."""
        return tuple(int(size) for size in traced(self.node).shape)

    def _number_type(self) -> torch.dtype:
        tensors = [traced(given) for given in self.arguments.values() if isinstance(given, fx.Node)]
        return tensors[0].dtype if tensors else torch.float32

    def unsupported(self, why: str) -> ExportError:
        """The error for a call that has no translation, ready to be raised."""
        return ExportError(
            f"the train step of this model needs '{self.node.target}' in a form that cannot be exported",
            why=why,
            next_step="train fewer parameters (fewer layers are differentiated then), or use another backbone",
        )


def traced(node: fx.Node) -> torch.Tensor:
    """The tensor a traced node stands for: sizes and dtype, no values."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"'{node.target}' does not give one tensor")
    return value


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy type of a torch type."""
    return np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)
