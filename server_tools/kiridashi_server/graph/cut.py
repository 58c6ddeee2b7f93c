"""Carry out a plan: the cut program, and the masked dense program that it must equal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import count as count_up
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from kiridashi.artifacts import write_atomic
from torch import Tensor, fx, nn

from kiridashi_server.graph.dims import Atom, Dim, Dims, count, indices, resolve, size_of
from kiridashi_server.graph.errors import GraphError
from kiridashi_server.graph.gates import Gated, insert_gates
from kiridashi_server.graph.nodes import arguments, operator_name, set_argument
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import assemble, change_tensors, copy_graph
from kiridashi_server.graph.rules import Pick, Result
from kiridashi_server.graph.tracker import Tracking

_FORMAT = "kiridashi-cut-2"


def cut(program: fx.GraphModule, tracking: Tracking, plan: Plan) -> fx.GraphModule:
    """A new program without the units that ``plan`` drops; ``program`` stays as it is.

    Its output equals that of :func:`masked`. Names, dtypes, devices and ``requires_grad`` are kept, and it can
    be tracked, cut and exported again.

    Raises:
        PlanError: the plan does not fit the tracking's layout.
    """
    plan.validate(tracking.layout)
    kept = {tracking.atoms[name]: np.asarray(units, dtype=np.int64) for name, units in plan.kept.items()}
    counts = {atom: len(units) for atom, units in kept.items()}
    chosen = _Chosen(kept, counts)
    graph = copy_graph(program)
    nodes = {node.name: node for node in graph.nodes}
    for slot in tracking.slots:
        if size := chosen.smaller(slot.dim):
            _resize(nodes[slot.node], slot.argument, slot.position, size)
    for name, result in tracking.values.items():
        nodes[name].meta["val"] = chosen.traced(nodes[name].meta.get("val"), result)
    for average in tracking.averages:
        _keep_divisor(graph, nodes[average.node], count(average.dim, counts) / size_of(average.dim))
    tensors = change_tensors(program, lambda name, tensor: chosen.of(tensor, tracking.tensors[name]))
    for pick in tracking.picks:
        _pick(graph, nodes[pick.node], pick, kept, tensors)
    return assemble(program, graph, tensors)


def masked(program: fx.GraphModule, tracking: Tracking, plan: Plan) -> nn.Module:
    """The dense program with zeros in place of dropped units: what "exact" is measured against.

    Raises:
        PlanError: the plan does not fit the tracking's layout.
    """
    plan.validate(tracking.layout)
    return _Masked(insert_gates(program, tracking), plan)


class _Masked(nn.Module):
    def __init__(self, gated: Gated, plan: Plan) -> None:
        super().__init__()
        self.gated = gated
        self.plan = plan

    def forward(self, *inputs: Tensor) -> Tensor:
        gates = {}
        for name, size in self.gated.sizes.items():
            gates[name] = torch.zeros(size, device=inputs[0].device)
            gates[name][list(self.plan.kept[name])] = 1
        result: Tensor = self.gated(inputs, gates)
        return result


class _Chosen:
    """What stays of tensors; sizes and indices are worked out once for all that run over the same dimensions."""

    def __init__(self, kept: Mapping[Atom, npt.NDArray[np.int64]], counts: Mapping[Atom, int]) -> None:
        self.kept = kept
        self.counts = counts
        self.sizes: dict[Dim, int] = {}
        self.now: dict[Dim, Dim] = {}
        self.known: dict[tuple[Dim, torch.device], Tensor] = {}
        self.shapes: dict[tuple[Any, ...], Tensor] = {}

    def smaller(self, dim: Dim) -> int:
        """The size of ``dim`` after the cut, or zero if the cut leaves it as it is."""
        known = self.sizes.get(dim)
        if known is None:
            size = count(dim, self.counts)
            self.sizes[dim] = known = 0 if size == size_of(dim) else size
        return known

    def of(self, tensor: Tensor, dims: Dims) -> Tensor:
        """The part of ``tensor`` that stays."""
        for axis, dim in enumerate(dims):
            if self.smaller(dim):
                tensor = tensor.index_select(axis, self._indices(resolve(dim), tensor.device))
        return tensor

    def traced(self, value: Any, result: Result) -> Any:
        """The traced value with its new shape, so that the cut program can be tracked again."""
        if isinstance(result, tuple):
            return tuple(self.traced(item, dims) for item, dims in zip(value, result, strict=True))
        now = list(map(self.smaller, result))
        if not any(now) or not isinstance(value, Tensor):
            return value
        key = (value.dtype, *map(self._resolved, result))
        if key not in self.shapes:
            shape = [
                was // size_of(dim) * size if size else was
                for was, size, dim in zip(value.shape, now, result, strict=True)
            ]
            self.shapes[key] = _traced(shape, value.dtype)
        return self.shapes[key]

    def _resolved(self, dim: Dim) -> Dim:
        if dim not in self.now:
            self.now[dim] = resolve(dim)
        return self.now[dim]

    def _indices(self, dim: Dim, device: torch.device) -> Tensor:
        if (dim, device) not in self.known:
            self.known[dim, device] = torch.from_numpy(indices(dim, self.kept)).to(device)
        return self.known[dim, device]


def _resize(node: fx.Node, argument: str, position: int | None, size: int) -> None:
    if position is None:
        set_argument(node, argument, size)
        return
    sizes = list(arguments(node)[argument])
    sizes[position] = size
    set_argument(node, argument, sizes)


def _keep_divisor(graph: fx.Graph, mean: fx.Node, share: float) -> None:
    """A mean over fewer units as the sum over them divided by the number there was."""
    if share == 1:
        return
    with graph.inserting_after(mean):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (mean, share))
    scaled.meta["val"] = mean.meta["val"]
    mean.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _pick(
    graph: fx.Graph,
    node: fx.Node,
    pick: Pick,
    kept: Mapping[Atom, npt.NDArray[np.int64]],
    tensors: dict[str, Tensor],
) -> None:
    """Take the kept indices of a constant's axis, by a buffer that is added to ``tensors``."""
    chosen = indices(pick.dim, kept)
    operand = arguments(node)[pick.argument]
    if len(chosen) == size_of(pick.dim) or not isinstance(operand, fx.Node):
        return
    if _narrowed(operand, pick, chosen, tensors):
        return
    name = next(name for number in count_up() if (name := f"picked.{node.name}_{number}") not in tensors)
    device = next(iter(tensors.values())).device
    tensors[name] = torch.from_numpy(chosen).to(device)
    with graph.inserting_before(node), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph has no module yet that could hold the buffer
        index = graph.get_attr(name)
        index.meta["val"] = _traced([len(chosen)], torch.int64)
        taken = graph.call_function(torch.ops.aten.index_select.default, (operand, pick.axis, index))
    value = operand.meta["val"]
    shape = list(value.shape)
    shape[pick.axis] = len(chosen)
    taken.meta["val"] = _traced(shape, value.dtype)
    set_argument(node, pick.argument, taken)


def _narrowed(operand: fx.Node, pick: Pick, chosen: npt.NDArray[np.int64], tensors: dict[str, Tensor]) -> bool:
    """Choose among what an earlier cut has picked already, so that two cuts leave what one would have left."""
    if operator_name(operand) != "index_select" or len(operand.users) != 1:
        return False
    values = arguments(operand)
    index = values["index"]
    if values["dim"] != pick.axis or not isinstance(index, fx.Node) or not str(index.target).startswith("picked."):
        return False
    name = str(index.target)
    tensors[name] = tensors[name][torch.from_numpy(chosen).to(tensors[name].device)]
    shape = list(operand.meta["val"].shape)
    shape[pick.axis] = len(chosen)
    index.meta["val"] = _traced([len(chosen)], torch.int64)
    operand.meta["val"] = _traced(shape, operand.meta["val"].dtype)
    return True


def _traced(shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
    """A tensor without data of that shape; its strides are zero, because an open batch makes real ones slow."""
    return _nothing(dtype).as_strided(shape, [0] * len(shape))


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device="meta")


def save_cut(path: Path, plan: Plan, module: fx.GraphModule) -> None:
    """Write a cut program's tensors and its plan as one safetensors file, atomically and without pickles.

    The same cut gives the same bytes.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in _state(module).items()}
    metadata = {_FORMAT: plan.to_json()}  # one entry: of several, the library writes some order
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def is_saved_cut(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is what :func:`save_cut` wrote."""
    return _FORMAT in metadata


def load_cut(program: fx.GraphModule, tracking: Tracking, path: Path) -> tuple[Plan, fx.GraphModule]:
    """Cut ``program`` by the plan in the file and load the file's tensors into it.

    Returns:
        The plan, and the program as it was saved.

    Raises:
        GraphError: the file is no saved cut, or its tensors are not those of the cut program.
        PlanError: its plan belongs to another layout.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise GraphError(f"{path} cannot be read as a cut", why=str(error)) from error
    if not is_saved_cut(metadata):
        raise GraphError(f"{path} is no saved cut", why=f"its header does not say {_FORMAT}")
    plan = Plan.from_json(metadata[_FORMAT])
    small = cut(program, tracking, plan)
    expected = _state(small)
    if _signature(expected) != _signature(tensors):
        raise GraphError(
            f"the tensors in {path} are not those of the cut program",
            why="names, shapes or dtypes differ",
            next_step="load it with the program (folded or not) that it was cut from",
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    return plan, small


def _signature(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _state(program: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(program.named_parameters()), **dict(program.named_buffers())}
