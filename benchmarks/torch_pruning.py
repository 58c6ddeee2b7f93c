"""torch-pruning on the same models: what it reaches, and how long it takes."""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIMIT_S = 60
"""Seconds after which a model counts as not finished; the others take less than one."""


@dataclass(frozen=True, slots=True)
class OracleResult:
    """What torch-pruning made of one model.

    Attributes:
        groups: how many it found.
        reach: share of the parameters that are in a layer, or are a parameter, that a group touches.
        seconds: of the processor, for building its graph and of dropping half of every group.
        runs: whether the model still computes afterwards.
        error: what it raised, or empty; then the other numbers are None.
    """

    groups: int | None = None
    reach: float | None = None
    seconds: float | None = None
    runs: bool | None = None
    error: str = ""


def prune_half(
    model: nn.Module, inputs: tuple[Tensor, ...], outputs: Sequence[str], names: Sequence[str], seed: int
) -> OracleResult:
    """Build torch-pruning's graph of a copy of ``model`` and drop a random half of each of its groups.

    Args:
        model: left as it is.
        inputs: an example batch.
        outputs: names of the modules whose outputs are the model's; groups that would cut them are left out.
        names: of the parameters that count for the reach (those the model reads).
        seed: of the choice of channels.
    """
    model = copy.deepcopy(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in set(names)}
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    gc.collect()
    started = time.process_time()
    try:
        with warnings.catch_warnings(), _at_most(LIMIT_S):
            warnings.simplefilter("ignore")
            touched, groups = _prune(model, inputs, outputs, seed, owners)
    except Exception as error:  # noqa: BLE001 - whatever it raises is its result for this model
        return OracleResult(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    seconds = time.process_time() - started
    reach = sum(sizes.get(name, 0) for name in touched) / sum(sizes.values())
    return OracleResult(groups, reach, seconds, _runs(model, inputs))


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer; on the main thread of a POSIX system."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _prune(
    model: nn.Module, inputs: tuple[Tensor, ...], outputs: Sequence[str], seed: int, owners: dict[int, str]
) -> tuple[set[str], int]:
    import torch_pruning

    rng = np.random.default_rng(seed)
    graph = torch_pruning.DependencyGraph().build_dependency(model, inputs, verbose=False)
    ignored = {model.get_submodule(name) for name in outputs}
    touched: set[str] = set()
    count = 0
    for group in graph.get_all_groups(ignored_layers=list(ignored)):
        if any(dep.target.module in ignored and graph.is_out_channel_pruning_fn(dep.handler) for dep, _ in group):
            continue
        if len(group[0].idxs) < 2:  # a single channel cannot go
            continue
        count += 1
        touched.update(_touched(graph, group, owners))
        size = len(group[0].idxs)
        dropped = sorted(int(index) for index in rng.choice(size, size // 2, replace=False))
        root = group[0].dep
        half = graph.get_pruning_group(root.target.module, root.handler, dropped)
        if graph.check_pruning_group(half):
            half.prune()
    return touched, count


def _touched(graph: Any, group: Any, owners: dict[int, str]) -> Iterator[str]:
    """Names of all parameters that a group cuts: of layers whose inputs are cut, the weight alone."""
    for dep, _ in group:
        member = dep.target.module
        if isinstance(member, nn.Parameter):
            parameters = [member]
        elif graph.is_out_channel_pruning_fn(dep.handler):
            parameters = list(member.parameters())
        else:
            parameters = [parameter for name, parameter in member.named_parameters() if not name.endswith("bias")]
        yield from (owners[id(parameter)] for parameter in parameters if id(parameter) in owners)


def _runs(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception:  # noqa: BLE001 - whatever a broken model raises
        return False
    return True
