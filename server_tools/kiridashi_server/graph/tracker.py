"""Track every dimension of a program from its parameters to its output, and find the groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from kiridashi_server.graph import operators
from kiridashi_server.graph.dims import Atom, Dims, freeze, freeze_all, fresh, is_frozen, leaves, reason_of, size_of
from kiridashi_server.graph.errors import GraphError
from kiridashi_server.graph.layout import Frozen, Group, Kind, Layout, Member
from kiridashi_server.graph.nodes import operator_name
from kiridashi_server.graph.program import tensors_of
from kiridashi_server.graph.protection import Protection
from kiridashi_server.graph.rules import Average, Call, Norm, Notes, Pick, Read, Result, Slot, Work, find_rule, shape_of

_SIZES_ALONE = frozenset({"sym_size", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})
"""Operators that take only sizes and the data type from their first argument."""

_NUMBERS = re.compile(r"(\d+)")
_TENSORS = (Tensor, tuple, list)

OUTPUT = "output"
"""Name under which a read of the program's output by the outside is recorded."""


@dataclass(frozen=True)
class Tracking:
    """What is known about a program's dimensions; the passes that cut, gate and count need nothing else.

    Attributes:
        tensors: dimensions of every parameter and buffer by name.
        values: dimensions of every tensor in the graph by node name (a tuple for operators with several).
        parameters: names of the parameters, each tensor once.
        atoms: the atom behind each group name.
        reads: where operators sum over a dimension, in graph order.
        slots: arguments that hold a size.
        averages: where an operator divides a sum over a dimension by its size.
        norms: where an operator takes statistics over a dimension that can be cut.
        picks: where a constant computed in the graph meets a dimension that can be cut.
        works: what every operator that multiplies does.
        layout: the groups.
        unknown: operators without a rule, or used in a way the rule does not understand, that froze something,
            and how often.
    """

    tensors: Mapping[str, Dims]
    values: Mapping[str, Result]
    parameters: tuple[str, ...]
    atoms: Mapping[str, Atom]
    reads: tuple[Read, ...]
    slots: tuple[Slot, ...]
    averages: tuple[Average, ...]
    norms: tuple[Norm, ...]
    picks: tuple[Pick, ...]
    works: tuple[Work, ...]
    layout: Layout
    unknown: Mapping[str, int]

    @cached_property
    def names(self) -> Mapping[Atom, str]:
        """The group name of each atom that can be cut."""
        return {atom: name for name, atom in self.atoms.items()}


def track(
    program: fx.GraphModule,
    *,
    cuttable_output: bool = False,
    protect: Iterable[str] = (),
    cut_normalised: bool = False,
) -> Tracking:
    """Find all groups of ``program``.

    Args:
        program: from :func:`~kiridashi_server.graph.program.capture`.
        cuttable_output: the output is features of shape [N, D] whose reader (a task's head) stands outside
            and can be cut too: then D is not frozen, and the output counts as a place where it is read.
        protect: names of modules or parameters that must stay as they are, every axis of every parameter in
            them: ``"blocks.3"``, ``"head.weight"``, ``"*.attention"`` (``*`` stands for anything).
        cut_normalised: whether units that a layer, root-mean-square or group normalisation takes statistics
            over can be cut, such as the residual stream of a transformer. The statistics are then those of
            the units that stay, in the cut as in the masked dense program. By default they are frozen.

    Raises:
        GraphError: ``cuttable_output`` and the output is not one tensor with a batch and one more dimension;
            or a name in ``protect`` that nothing has.
    """
    return _Tracker(program, protect, cuttable_output=cuttable_output, cut_normalised=cut_normalised).run()


class _Tracker:
    def __init__(
        self, program: fx.GraphModule, protect: Iterable[str], *, cuttable_output: bool, cut_normalised: bool
    ) -> None:
        self.program = program
        self.objects = tensors_of(program)
        self.protection = Protection.of(protect, tuple(self.objects))
        self.cuttable_output = cuttable_output
        self.cut_normalised = cut_normalised
        self.known: dict[fx.Node, Result] = {}
        self.tensors: dict[str, Dims] = {}
        self.by_identity: dict[int, Dims] = {}
        self.notes = Notes()
        self.unknown: dict[str, int] = {}

    def run(self) -> Tracking:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.known[node] = self._input(node)
            elif node.op == "get_attr" and node.target in self.objects:
                self.known[node] = self._tensor(str(node.target))
                if not isinstance(self.objects[str(node.target)], nn.Parameter):
                    self.notes.constants.add(node)
            elif node.op == "output":
                self._output(node)
            elif node.op == "call_function":
                self._call(node)
        parameters = tuple(self._parameters())
        atoms, layout = _groups(self.tensors, parameters, self.notes)
        return Tracking(
            tensors=self.tensors,
            values={node.name: result for node, result in self.known.items()},
            parameters=parameters,
            atoms=atoms,
            reads=tuple(self.notes.reads),
            slots=tuple(self.notes.slots),
            averages=tuple(self.notes.averages),
            norms=tuple(self.notes.norms),
            picks=tuple(self.notes.picks),
            works=tuple(self.notes.works),
            layout=layout,
            unknown=self.unknown,
        )

    def _input(self, node: fx.Node) -> Dims:
        return [fresh(size, "input") for size in shape_of(node.meta["val"])]

    def _tensor(self, name: str) -> Dims:
        """Dimensions of a parameter or buffer; one tensor under two names has the same ones."""
        if name not in self.tensors:
            tensor = self.objects[name]
            self.tensors[name] = self.by_identity.setdefault(id(tensor), [fresh(size) for size in tensor.shape])
            if self.protection.covers(name):
                freeze_all(self.tensors[name], "protected")
        return self.tensors[name]

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        call = Call(node, self.known, self.notes, normalised=self.cut_normalised)
        if call.name in _SIZES_ALONE or self.notes.constants.issuperset(node.all_input_nodes):
            self.notes.constants.add(node)
        rule = find_rule(call.name)
        result = rule(call) if rule is not None else None
        if result is None or not _fits(result, call):
            result = self._give_up(node, value)
        if isinstance(value, _TENSORS):
            self.known[node] = result

    def _give_up(self, node: fx.Node, value: Any) -> Result:
        name = operator_name(node)
        if any(not is_frozen(dim) for operand in node.all_input_nodes for dim in self._dims(operand)):
            self.unknown[name] = self.unknown.get(name, 0) + 1
        for operand in node.all_input_nodes:
            self._freeze(operand, f"operator without a rule here: {name}")
        if isinstance(value, tuple | list):
            return tuple(_frozen(item, name) for item in value)
        return _frozen(value, name)

    def _freeze(self, node: fx.Node, reason: str) -> None:
        freeze_all(self._dims(node), reason)

    def _dims(self, node: fx.Node) -> Dims:
        """All dimensions of what ``node`` gives, one tensor or several."""
        result = self.known.get(node, [])
        return [dim for dims in result for dim in dims] if isinstance(result, tuple) else result

    def _output(self, node: fx.Node) -> None:
        value = node.args[0]
        if not self.cuttable_output:
            for operand in node.all_input_nodes:
                self._freeze(operand, "output")
            return
        dims = self.known.get(value) if isinstance(value, fx.Node) else None
        if not isinstance(dims, list) or len(dims) != 2:
            raise GraphError(
                "the program's output cannot be cut",
                why="it is not one tensor of shape [batch, features]",
                next_step="let the model return pooled features, or track it with cuttable_output=False",
            )
        freeze(dims[0], "output")
        self.notes.reads.append(Read(OUTPUT, OUTPUT, -1, dims[1]))

    def _parameters(self) -> Iterator[str]:
        seen: set[int] = set()
        for name, tensor in self.objects.items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name


def _frozen(value: Any, reason: str) -> Dims:
    return [fresh(size, reason) for size in shape_of(value)] if isinstance(value, Tensor) else []


def _fits(result: Result, call: Call) -> bool:
    """Whether a rule's dimensions have the traced sizes; if not, the rule does not hold for this call."""
    value = call.node.meta.get("val")
    if isinstance(value, Tensor):
        return isinstance(result, list) and tuple(map(size_of, result)) == call.shape
    if isinstance(value, tuple | list):
        return isinstance(result, tuple) and tuple([tuple(map(size_of, dims)) for dims in result]) == call.shapes
    return True


def _groups(tensors: Mapping[str, Dims], parameters: Sequence[str], notes: Notes) -> tuple[dict[str, Atom], Layout]:
    """Unfrozen atoms that parameters run over, named and in the order in which the program makes them."""
    members: dict[Atom, list[Member]] = {}
    frozen: list[Frozen] = []
    for name in parameters:
        for axis, dim in enumerate(tensors[name]):
            units = list(dict.fromkeys([atom for atom in leaves(dim) if not atom.frozen]))
            for atom in units:
                members.setdefault(atom, []).append(Member(name, axis))
            if not units and size_of(dim) > 1 and reason_of(dim) != operators.KERNEL:
                frozen.append(Frozen(name, axis, size_of(dim), reason_of(dim)))
    heads = {atom for dim in notes.heads for atom in leaves(dim)}
    order = {name: place for place, name in enumerate(notes.producers)}
    making = {(name, axis) for name, (axis, _) in notes.producers.items()}

    natural = {name: _natural(name) for name in parameters}
    atoms: dict[str, Atom] = {}
    found: list[tuple[int, Group]] = []
    for atom, places in members.items():
        places.sort(key=lambda member: (natural[member.parameter], member.axis))
        makers = {place.parameter for place in places if (place.parameter, place.axis) in making}
        made = sorted(makers, key=order.__getitem__)
        kind: Kind = "node"
        if atom in heads:
            kind = "head"
        elif any(notes.producers[name][1] == "filter" for name in made):
            kind = "filter"
        name = _name((made or [places[0].parameter])[0], kind, atoms)
        atoms[name] = atom
        found.append((order[made[0]] if made else len(order), Group(name, atom.size, kind, tuple(places))))
    found.sort(key=lambda item: item[0])
    return atoms, Layout(tuple(group for _, group in found), tuple(frozen))


def _name(parameter: str, kind: Kind, taken: Mapping[str, Atom]) -> str:
    """The weight's module; when it makes several groups (fused attention), kind and number tell them apart."""
    base = parameter.removesuffix(".weight")
    candidates = [base if kind != "head" else f"{base}:head"]
    candidates += [f"{base}:{kind}{number}" for number in range(2, 2 + len(taken))]
    return next(name for name in candidates if name not in taken)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key in which ``blocks.2`` comes before ``blocks.10``."""
    return tuple([(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(name)])
