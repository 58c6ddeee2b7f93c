"""Programs that run their graph operator by operator, without code that is generated and compiled first."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import fx


class Program(fx.GraphModule):
    """A graph module whose ``recompile`` lists the graph's calls instead of writing Python code of them.

    For a network of some hundred operators this takes a tenth of the time, and running it costs a fraction of a
    microsecond more for each operator. The code is still there to be read, made when it is asked for.
    """

    def recompile(self) -> Any:
        """Make ``forward`` what the graph says now; call it after an edit."""
        type(self).forward = _forward(self.graph)  # type: ignore[method-assign]  # each instance has a class of its own

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

    Its result goes to the place ``result``; then nothing needs the values at the places ``done`` any more.
    """

    function: Callable[..., Any]
    places: tuple[int, ...]
    keywords: tuple[str, ...]
    result: int
    done: tuple[int, ...]


class _Steps:
    """The calls of a graph in order, and the values that they start from: the module, the inputs, the constants."""

    def __init__(self, graph: fx.Graph) -> None:
        self.values: list[Any] = [None]
        self.steps: list[_Step] = []
        self.inputs: dict[str, int] = {}
        self.output = 0
        self._places: dict[fx.Node, int] = {}
        last_uses = _last_uses(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.inputs[str(node.target)] = self._places[node] = self._new(None)
            elif node.op == "output":
                self.output = self._place(node.args[0], [])
            else:
                self._call(node, last_uses.get(node, []))

    def _call(self, node: fx.Node, last_used: list[fx.Node]) -> None:
        function: Any = node.target
        places, made = (0,), list[int]()
        if node.op == "get_attr":
            function = attrgetter(function)
        elif node.op == "call_function":
            places = tuple([self._place(value, made) for value in (*node.args, *node.kwargs.values())])
        else:
            raise NotImplementedError(f"a program has no {node.op}")
        self._places[node] = result = self._new(None)
        done = [self._places[one] for one in last_used] + made
        self.steps.append(_Step(function, places, tuple(node.kwargs), result, tuple(done)))

    def _place(self, value: Any, made: list[int]) -> int:
        """Where an argument stands; one that holds results is put together by a step of its own, named in ``made``."""
        if isinstance(value, fx.Node):
            return self._places[value]
        result = self._new(value)
        if isinstance(value, list | tuple | dict | slice):
            nodes: dict[fx.Node, None] = {}
            fx.map_arg(value, nodes.setdefault)
            if nodes:
                places = tuple([self._places[node] for node in nodes])
                self.steps.append(_Step(_Filled(value, tuple(nodes)), places, (), result, ()))
                made.append(result)
        return result

    def _new(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1


class _Filled(NamedTuple):
    """An argument that holds results of other calls: called with these, it gives the argument."""

    template: Any
    nodes: tuple[fx.Node, ...]

    def __call__(self, *results: Any) -> Any:
        return fx.map_arg(self.template, dict(zip(self.nodes, results, strict=True)).__getitem__)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, those whose results nothing needs after it, its own if nothing does at all."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        last = [one for one in (node, *node.all_input_nodes) if one not in seen]
        seen.update(last)
        found[node] = last
    return found


def _forward(graph: fx.Graph) -> Callable[..., Any]:
    made = _Steps(graph)
    start, steps, inputs, output = made.values, made.steps, tuple(made.inputs.values()), made.output
    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *made.inputs)]
    signature = inspect.Signature(names)

    def forward(self: Program, *given: Any, **named: Any) -> Any:
        if named or len(given) != len(inputs):
            _, *given = signature.bind(self, *given, **named).args
        values = start.copy()
        values[0] = self
        for place, value in zip(inputs, given, strict=True):
            values[place] = value
        for function, places, keywords, result, done in steps:
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
