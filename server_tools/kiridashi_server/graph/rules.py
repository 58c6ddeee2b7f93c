"""What an operator rule sees and states, and the table of rules.

A rule is a function from a :class:`Call` to the dimensions of the call's result; it is registered under the
names of the operators it describes, so a new operator is one entry in ``operators`` (or anywhere, through
:func:`rule`). While it runs it may state

* that dimensions are the same (:func:`dims.unify`) or must stay whole (:func:`dims.freeze`);
* that the operator *reads* a dimension, summing over it: there removed units must count as zero;
* that an argument holds a size that a cut has to rewrite, or that the operator divides by a size;
* the multiply-accumulate operations it costs, and which weights it makes channels with.

A rule returns None for a call it does not understand; then everything the call touches is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from torch import Tensor, fx

from kiridashi_server.graph.dims import ONE, Dim, Dims, freeze, fresh, size_of
from kiridashi_server.graph.nodes import arguments, operator_name

Result: TypeAlias = Dims | tuple[Dims, ...]
Rule: TypeAlias = "Callable[[Call], Result | None]"

BATCH = 1_000_003
"""Size that stands for an open batch dimension: prime and large, so that it never mixes with another size."""

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names; a name also covers its in-place form (``add_``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"operator {name!r} has a rule already")
            _RULES[name] = function
        return function

    return register


def find_rule(name: str) -> Rule | None:
    """The rule for the operator called ``name``, if there is one."""
    return _RULES.get(name) or _RULES.get(name.removesuffix("_"))


@dataclass(frozen=True, slots=True)
class Read:
    """``node`` sums over ``dim``, which is axis ``axis`` (negative: from the end) of its ``argument``.

    Where the argument is a list of tensors, ``position`` tells which of them.
    """

    node: str
    argument: str
    axis: int
    dim: Dim
    position: int | None = None


@dataclass(frozen=True, slots=True)
class Average:
    """``node`` divides a sum over ``dim`` by its size; a cut has to keep the divisor."""

    node: str
    dim: Dim


@dataclass(frozen=True, slots=True)
class Pick:
    """Axis ``axis`` (negative) of the constant ``argument`` of ``node`` meets ``dim``: a cut picks its indices."""

    node: str
    argument: str
    axis: int
    dim: Dim


@dataclass(frozen=True, slots=True)
class Norm:
    """``node`` takes statistics over ``dim``, its channels; those that are cut do not count."""

    node: str
    dim: Dim


@dataclass(frozen=True, slots=True)
class Slot:
    """``argument`` of ``node`` (or its item ``position``) is the size of ``dim``."""

    node: str
    argument: str
    position: int | None
    dim: Dim


WorkKind: TypeAlias = Literal["dense", "depthwise", "product"]
"""What multiplies: a weight of many channels, a weight of one channel for each, or two results with each other."""


@dataclass(frozen=True, slots=True)
class Work:
    """``node`` does one multiply-accumulate for every index of ``rest``, ``inner`` and ``outer``.

    ``inner`` is what it sums over, a kernel's own size aside; ``outer`` the channels of its result; ``rest`` is
    everything else: batch, positions, heads, kernel. ``taps`` is the kernel's size, 1 for what has none.
    """

    node: str
    kind: WorkKind
    inner: Dim
    outer: Dim
    rest: Dims
    taps: int = 1


@dataclass(slots=True)
class Notes:
    """What the rules stated besides dimensions, over the whole program.

    ``constants`` are the nodes whose values depend on no input and no parameter; sizes of inputs do not count.
    """

    reads: list[Read] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    averages: list[Average] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    picks: list[Pick] = field(default_factory=list)
    constants: set[fx.Node] = field(default_factory=set)
    works: list[Work] = field(default_factory=list)
    producers: dict[str, tuple[int, str]] = field(default_factory=dict)
    heads: list[Dim] = field(default_factory=list)


class Call:
    """One operator call, as its rule sees it."""

    def __init__(self, node: fx.Node, known: Mapping[fx.Node, Result], notes: Notes, *, normalised: bool) -> None:
        self.node = node
        self.name = operator_name(node)
        self.arguments = arguments(node)
        self.normalised = normalised
        self._known = known
        self._notes = notes
        self._shapes: tuple[tuple[int, ...], ...] = ()

    def dims(self, argument: str) -> Dims | None:
        """Dimensions of a tensor argument; None when it is absent or no single tensor."""
        return self.dims_of(self.arguments.get(argument))

    def dims_of(self, value: Any) -> Dims | None:
        """Dimensions of ``value`` if it is a node that gives one tensor."""
        found = self._known.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, list) else None

    def parts_of(self, value: Any) -> tuple[Dims, ...] | None:
        """Dimensions of each tensor of ``value`` if it is a node that gives several."""
        found = self._known.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, tuple) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, the open batch counted as :data:`BATCH`."""
        return self.shapes[0]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the results of an operator with several."""
        if not self._shapes:
            value = self.node.meta["val"]
            self._shapes = tuple(shape_of(one) for one in ((value,) if isinstance(value, Tensor) else value))
        return self._shapes

    def reads(self, argument: str, axis: int, dim: Dim, position: int | None = None) -> None:
        """State that the operator sums over axis ``axis`` (negative) of ``argument``, or of its item ``position``.

        A factor of ``dim`` that the operator passes on is given as :func:`passed_on`: its gate stands where
        what comes out is read.
        """
        self._notes.reads.append(Read(self.node.name, argument, axis, dim, position))

    def averages(self, dim: Dim) -> None:
        """State that the operator divides a sum over ``dim`` by its size."""
        self._notes.averages.append(Average(self.node.name, dim))

    def is_constant(self, value: Any) -> bool:
        """Whether ``value`` is a node that depends on no input and no parameter."""
        return value in self._notes.constants

    def is_parameter(self, argument: str) -> bool:
        """Whether the argument is a parameter or a buffer, or one seen through views of it."""
        source = self.arguments.get(argument)
        while isinstance(source, fx.Node) and source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        return isinstance(source, fx.Node) and source.op == "get_attr"

    def picks(self, argument: str, axis: int, dim: Dim) -> None:
        """State that axis ``axis`` (negative) of the constant ``argument`` runs over ``dim``, which may be cut."""
        self._notes.picks.append(Pick(self.node.name, argument, axis, dim))

    def normalises(self, dim: Dim) -> None:
        """State that the operator takes statistics over ``dim``; groups that have their own are passed on."""
        self._notes.norms.append(Norm(self.node.name, dim))

    def resizes(self, argument: str, dim: Dim) -> None:
        """State that ``argument`` is the size of ``dim``."""
        self._notes.slots.append(Slot(self.node.name, argument, None, dim))

    def resizes_items(self, argument: str, dims: Sequence[Dim]) -> None:
        """State that the items of the list ``argument`` are the sizes of ``dims``.

        A size of -1 is inferred and needs no rewriting; one that the graph computes cannot be rewritten.
        """
        for position, (item, dim) in enumerate(zip(self.arguments[argument], dims, strict=True)):
            if isinstance(item, fx.Node):
                freeze(dim, "its size is computed in the graph")
            elif item != -1:
                self._notes.slots.append(Slot(self.node.name, argument, position, dim))

    def works(
        self, kind: WorkKind, rest: Iterable[Dim], inner: Dim = ONE, outer: Dim = ONE, *, kernel: Sequence[Dim] = ()
    ) -> None:
        """State what the operator multiplies, as in :class:`Work`; ``kernel`` is in addition to ``rest``."""
        taps = math.prod(size_of(dim) for dim in kernel)
        self._notes.works.append(Work(self.node.name, kind, inner, outer, [*rest, *kernel], taps))

    def produces(self, argument: str, kind: str, axis: int = 0) -> None:
        """State that the weight ``argument`` makes new channels of this kind on axis ``axis``.

        A weight that is computed, such as a standardised one, counts as the parameter of its shape behind it.
        """
        value = source = self.arguments[argument]
        while isinstance(source, fx.Node) and source.op == "call_function" and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return
        if source is value or source.meta["val"].shape == value.meta["val"].shape:
            self._notes.producers.setdefault(str(source.target), (axis, kind))

    def has_heads(self, dims: Sequence[Dim]) -> None:
        """State that ``dims`` are the leading dimensions of a product: what can be cut of them are heads."""
        self._notes.heads.extend(dims)


def passed_on(dim: Dim) -> Dim:
    """In a read's dimension, the place of a factor that is not summed over."""
    return fresh(size_of(dim), "passed on")


def shape_of(value: Tensor) -> tuple[int, ...]:
    """Shape of a traced tensor in plain numbers, an open batch counted as :data:`BATCH`."""
    return tuple([size if isinstance(size, int) else _with_batch(size.node.expr) for size in value.shape])


@lru_cache(maxsize=4096)
def _with_batch(expression: Any) -> int:
    """A symbolic size with its symbols replaced; programs hold the same few again and again."""
    return int(expression.subs(dict.fromkeys(expression.free_symbols, BATCH)))
