"""Programs that run their graph operator by operator, without code that is generated and compiled first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import fx

_NESTED = (list, tuple, dict, slice)


class Program(fx.GraphModule):
    """A graph module whose ``recompile`` lists the graph's calls instead of writing Python code of them.

    For a network of some hundred operators this takes a tenth of the time, and running it costs a fraction of a
    microsecond more for each operator. The code is still there to be read, made when it is asked for.
    """

    def recompile(self) -> Any:
        """Make ``forward`` what the graph says now; call it after an edit."""
        type(self).forward = _forward(self.graph)  # each instance has a class of its own

    @property
    def code(self) -> str:
        """The graph as Python code."""
        return str(self.graph.python_code("self").src)

    @property
    def _code(self) -> str:  # what the base class prints and names in its messages
        return self.code

    def __reduce__(self) -> tuple[Any, ...]:
        return fx.GraphModule(self, self.graph, class_name="Program").__reduce__()


class _Step(NamedTuple):
    """One call: of ``function``, with the values at ``places``, the last of them by the names ``keywords``.

    Its result goes to the place ``result``.
    """

    function: Callable[..., Any]
    places: tuple[int, ...]
    keywords: tuple[str, ...]
    result: int


class _Steps:
    """The calls of a graph in order, and the values that they start from: the module, the inputs, the constants."""

    def __init__(self, graph: fx.Graph) -> None:
        self.values: list[Any] = [None]
        self.steps: list[_Step] = []
        self.inputs: dict[str, int] = {}
        self.output = 0
        self._places: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.inputs[str(node.target)] = self._places[node] = self._place(None)
            elif node.op == "get_attr":
                self._places[node] = self._step(attrgetter(str(node.target)), (0,), ())
            elif node.op == "call_function":
                places = tuple(map(self._place, (*node.args, *node.kwargs.values())))
                self._places[node] = self._step(node.target, places, tuple(node.kwargs))
            elif node.op == "output":
                self.output = self._place(node.args[0])
            else:
                raise NotImplementedError(f"a program has no {node.op}")

    def done(self) -> list[Sequence[int]]:
        """After each step, the places of inputs and results that nothing needs any more."""
        last = dict.fromkeys(self.inputs.values(), 0)
        for index, step in enumerate(self.steps):
            for place in step.places:
                if place in last:
                    last[place] = index
            last[step.result] = index
        found: dict[int, list[int]] = {}
        for place, index in last.items():
            if place != self.output:
                found.setdefault(index, []).append(place)
        return [found.get(index, ()) for index in range(len(self.steps))]

    def _place(self, value: Any) -> int:
        """Where an argument stands; one that holds results is put together by a step of its own."""
        if isinstance(value, fx.Node):
            return self._places[value]
        if isinstance(value, _NESTED):
            nodes: dict[fx.Node, None] = {}
            fx.map_arg(value, nodes.setdefault)
            if nodes:
                return self._step(_Filled(value, tuple(nodes)), tuple(map(self._places.__getitem__, nodes)), ())
        self.values.append(value)
        return len(self.values) - 1

    def _step(self, function: Any, places: tuple[int, ...], keywords: tuple[str, ...]) -> int:
        """Add a step and give the place of its result."""
        self.values.append(None)
        self.steps.append(_Step(function, places, keywords, len(self.values) - 1))
        return len(self.values) - 1


class _Filled(NamedTuple):
    """An argument that holds results of other calls: called with these, it gives the argument."""

    template: Any
    nodes: tuple[fx.Node, ...]

    def __call__(self, *results: Any) -> Any:
        return fx.map_arg(self.template, dict(zip(self.nodes, results, strict=True)).__getitem__)


def _forward(graph: fx.Graph) -> Callable[..., Any]:
    made = _Steps(graph)
    start, inputs, output = made.values, tuple(made.inputs.values()), made.output
    steps = list(zip(made.steps, made.done(), strict=True))
    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *made.inputs)]
    signature = inspect.Signature(names)

    def forward(self: Program, *given: Any, **named: Any) -> Any:
        if named or len(given) != len(inputs):
            given = signature.bind(self, *given, **named).args[1:]
        values = start.copy()
        values[0] = self
        for place, value in zip(inputs, given, strict=True):
            values[place] = value
        for (function, places, keywords, result), done in steps:
            arguments = [values[place] for place in places]
            if keywords:
                split = len(arguments) - len(keywords)
                values[result] = function(*arguments[:split], **dict(zip(keywords, arguments[split:], strict=True)))
            else:
                values[result] = function(*arguments)
            for place in done:
                values[place] = None
        return values[output]

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
