"""What a cut makes a runtime do, in a few kinds of work, as exact functions of the numbers of kept units.

Runtimes do not spend their time by multiply-accumulates alone. They read every weight once, so weights that do not
fit into the cache cost by the byte; they move activations; and their kernels work on blocks of channels: a width that
is no multiple of the block is padded to one where it is made, and takes another, slower path where it is read. Each
kind below is a sum of products of one number per group, like the polynomials of :mod:`cost`; only that the number may
also be the unit count rounded up to the block, or the count where it does not fill its blocks and zero where it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor, fx

from kiridashi_server.graph.activations import VIEWS
from kiridashi_server.graph.dims import Atom, Dim, Dims, resolve
from kiridashi_server.graph.nodes import operator_name
from kiridashi_server.graph.polynomial import Factor, Polynomial, Shape, evaluate, shaped
from kiridashi_server.graph.rules import BATCH, Work
from kiridashi_server.graph.tracker import Tracking

_Sum: TypeAlias = dict[tuple[Factor, ...], float]

RAGGED = ("dense-ragged", "depthwise-ragged", "ragged-out")
"""Kinds of work that there are only where widths do not fill their blocks."""
_SMALL_WINDOW = 9
_SLOW = frozenset({"gelu", "silu", "sigmoid", "tanh", "softmax", "_softmax", "exp", "hardswish", "hardsigmoid", "elu"})


@dataclass(frozen=True)
class Workload:
    """Kinds of work for one sample, by name.

    Attributes:
        block: of channels, that the kernels work on.
        sizes: unit counts of the dense program.
        kinds: the polynomial of each kind. Multiply-accumulates: ``dense``, ``depthwise``, ``product``; ``dense`` once
            more with the channels made rounded up to whole pairs of blocks, ``dense-paired``, for kernels that hold
            two; ``depthwise`` once more where a window has more than 9 taps, ``depthwise-large``: runtimes have code of
            its own for 3 x 3; and where the channels read do not fill their blocks, ``dense-ragged`` and
            ``depthwise-ragged``.
            Elements: ``weights``, results ``dense-out`` (once more ``ragged-out``), ``depthwise-out``, ``slow``
            (of operators with transcendental functions) and ``other``, and ``dense-in`` that is read.
    """

    block: int
    sizes: Mapping[str, int]
    kinds: Mapping[str, Polynomial]

    @classmethod
    def of(cls, program: fx.GraphModule, tracking: Tracking, block: int) -> Workload:
        """Count the work of a tracked program."""
        return cls(block, dict(tracking.layout.sizes), _Counter(program, tracking, block).count())

    def at(self, widths: Mapping[str, int]) -> dict[str, float]:
        """How much there is of each kind after a cut that keeps ``widths`` units; groups left out are whole."""
        counts = {**self.sizes, **widths}
        return {kind: evaluate(terms, counts) for kind, terms in self.kinds.items()}


class _Counter:
    def __init__(self, program: fx.GraphModule, tracking: Tracking, block: int) -> None:
        self._program = program
        self._tracking = tracking
        self._block = block
        self._kinds: dict[str, _Sum] = {}

    def count(self) -> dict[str, Polynomial]:
        tracking = self._tracking
        for name in tracking.parameters:
            self._add("weights", tracking.tensors[name])
        for work in tracking.works:
            self._work(work)
        working = {work.node for work in tracking.works}
        for node in self._program.graph.nodes:
            if node.op == "call_function" and node.name not in working and isinstance(node.meta.get("val"), Tensor):
                self._other(node)
        return {
            kind: tuple((value, factors) for factors, value in sorted(total.items()))
            for kind, total in self._kinds.items()
        }

    def _work(self, work: Work) -> None:
        result = self._tracking.values[work.node]
        dims = result if isinstance(result, list) else []
        if work.kind == "product":
            self._add("product", [*work.rest, work.inner, work.outer])
        elif work.kind == "depthwise":
            self._add("depthwise", [*work.rest, work.outer])
            if work.taps > _SMALL_WINDOW:
                self._add("depthwise-large", [*work.rest, work.outer])
            self._add("depthwise-ragged", work.rest, (work.outer, "ragged"))
            self._add("depthwise-out", dims)
        else:
            self._add("dense", work.rest, (work.inner, "count"), (work.outer, "filled"))
            self._add("dense-paired", work.rest, (work.inner, "count"), (work.outer, "paired"))
            self._add("dense-ragged", work.rest, (work.inner, "ragged"), (work.outer, "count"))
            self._add("ragged-out", dims, (work.inner, "odd"))
            self._add("dense-in", [*_positions(dims, work), work.inner])
            self._add("dense-out", dims)

    def _other(self, node: fx.Node) -> None:
        name = operator_name(node)
        result = self._tracking.values.get(node.name)
        if name not in VIEWS and isinstance(result, list):
            self._add("slow" if name in _SLOW else "other", result)

    def _add(self, kind: str, dims: Sequence[Dim], *channels: tuple[Dim, Shape]) -> None:
        total: _Sum = {(): 1.0}
        for dim, shape in [*((dim, "count") for dim in dims), *channels]:
            total = _times(total, self._size(dim, shape))
        into = self._kinds.setdefault(kind, {})
        for factors, value in total.items():
            into[factors] = into.get(factors, 0.0) + value

    def _size(self, dim: Dim, shape: Shape) -> _Sum:
        """A dimension's width in the given shape; a concatenation is the sum of its pieces, each in that shape."""
        atoms = resolve(dim)
        if len(atoms) == 1 and atoms[0].pieces:
            return _plus(self._size(piece, shape) for piece in atoms[0].pieces)
        names = self._tracking.names
        groups = [names[atom] for atom in atoms if atom in names]
        rest = [atom for atom in atoms if atom not in names]
        if len(groups) > 1 or any(atom.pieces for atom in rest):
            # Several groups fill blocks or not as one; they are taken as if they did.
            return self._product(atoms) if shape in ("count", "filled", "paired") else {}
        scale = 1
        for atom in rest:
            scale *= atom.size // BATCH if atom.size % BATCH == 0 else atom.size
        if not groups:
            value = float(shaped(np.array(scale), shape, self._block))
            return {(): value} if value else {}
        if shape == "count":
            return {(Factor(groups[0]),): float(scale)}
        return {(Factor(groups[0], scale, shape, self._block),): 1.0}

    def _product(self, atoms: Iterable[Atom]) -> _Sum:
        """A product of several groups."""
        total: _Sum = {(): 1.0}
        for atom in atoms:
            pieces = atom.pieces or None
            factor = _plus(self._size(piece, "count") for piece in pieces) if pieces else self._size((atom,), "count")
            total = _times(total, factor)
        return total


def _positions(dims: Dims, work: Work) -> list[Dim]:
    """The dimensions of a result without its channels."""
    return [dim for dim in dims if resolve(dim) != resolve(work.outer)]


def _times(left: _Sum, right: _Sum) -> _Sum:
    result: _Sum = {}
    for factors, value in left.items():
        for more, other in right.items():
            key = tuple(sorted(factors + more))
            result[key] = result.get(key, 0.0) + value * other
    return result


def _plus(sums: Iterable[_Sum]) -> _Sum:
    result: _Sum = {}
    for one in sums:
        for factors, value in one.items():
            result[factors] = result.get(factors, 0.0) + value
    return result
