"""How much of a program's intermediate results is alive at once: what a runtime's arena has to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, fx

from kiridashi_server.graph.cost import Term, evaluate_terms, sum_of_products
from kiridashi_server.graph.dims import Dims
from kiridashi_server.graph.nodes import operator_name
from kiridashi_server.graph.tracker import Tracking

VIEWS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "detach"}
    | {"alias", "contiguous", "clone", "dropout", "getitem", "split", "chunk", "unbind", "sym_size", "_to_copy", "to"}
)
"""Operators that compute nothing: their results lie where their operand does."""

_SHARES = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1)


def activation_peaks(program: fx.GraphModule, tracking: Tracking) -> tuple[tuple[Term, ...], ...]:
    """Elements alive at the places where most are; the peak of a cut is the largest of these polynomials.

    A result is alive from the operator that makes it to the last that reads it. Which place is the fullest depends on
    the widths: kept are those that are the fullest for some even narrowing of all groups.
    """
    places = {frozenset(alive) for alive in _alive(program)}
    polynomials = [
        sum_of_products([dims for name in sorted(alive) for dims in _dims(tracking, name)], tracking)
        for alive in sorted(places, key=sorted)
    ]
    fullest: dict[int, None] = {}
    for share in _SHARES:
        counts = {name: max(1, round(size * share)) for name, size in tracking.layout.sizes.items()}
        values = [evaluate_terms(terms, counts) for terms in polynomials]
        if values:
            fullest[max(range(len(values)), key=values.__getitem__)] = None
    return tuple(polynomials[index] for index in fullest)


def _alive(program: fx.GraphModule) -> Iterator[set[str]]:
    """Names of the results that are alive while each operator runs, its own included."""
    owner = _owners(program)
    last_use: Mapping[str, int] = {
        owner[operand]: position
        for position, node in enumerate(program.graph.nodes)
        for operand in node.all_input_nodes
        if operand in owner
    }
    alive: set[str] = set()
    for position, node in enumerate(program.graph.nodes):
        if node in owner:
            alive.add(owner[node])
            yield set(alive)
        alive = {name for name in alive if last_use.get(name, position) > position}


def _owners(program: fx.GraphModule) -> dict[fx.Node, str]:
    """For every result, the name of the result whose memory it lies in."""
    owner: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" or (node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)):
            source = next((operand for operand in node.all_input_nodes if operand in owner), None)
            is_view = node.op == "call_function" and operator_name(node) in VIEWS
            owner[node] = owner[source] if is_view and source is not None else node.name
    return owner


def _dims(tracking: Tracking, name: str) -> list[Dims]:
    result = tracking.values.get(name)
    return [result] if isinstance(result, list) else []
