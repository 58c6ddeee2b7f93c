"""What reuse is compared with: other ways to the same kept size, with the same recovery after them.

The planners choose units and nothing else. Iterative pruning for the task itself alternates cutting and tuning; the
iterations and seconds that it needs beyond the others are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from kiridashi.errors import InputError
from torch import Tensor, fx

from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.amp.taylor import taylor_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.dims import indices
from kiridashi_server.graph.layout import Group
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import tensor_of
from kiridashi_server.graph.tracker import Tracking, track
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.blank import Blank
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import Recovered, RecoverSettings, cut_and_repair, recover
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.tasks.task import Samples


@dataclass(frozen=True, eq=False)
class Target:
    """A task and a size: its few labelled samples, number of classes, the parameters to keep, and a seed.

    ``keep_parameters`` is read as :func:`~kiridashi_server.compose.selection.select` reads it.
    """

    samples: Samples
    classes: int
    keep_parameters: int | float
    seed: int


@dataclass(frozen=True, eq=False)
class IterativeResult:
    """Task-specific iterative pruning: the recovered model, and what it took.

    Attributes:
        recovered: model, plan for the dense layout, losses of the last round, seconds of all rounds.
        extra_iterations: iterations before the last round, which other methods do not have.
    """

    recovered: Recovered
    extra_iterations: int


def l1_plan(backbone: Backbone, target: Target) -> Plan:
    """Units by the L1 norm of the weights that make them, ranked within each group: the same share of every group."""
    scores = {group.name: _ranks(norms) for group, norms in _filter_norms(backbone)}
    return _select(backbone, scores, target)


def random_plan(backbone: Backbone, target: Target) -> Plan:
    """Units at random, the same share of every group."""
    generator = np.random.default_rng(target.seed)
    scores = {group.name: _ranks(generator.random(group.size)) for group in backbone.layout.groups}
    return _select(backbone, scores, target)


def taylor_plan(backbone: Backbone, target: Target) -> Plan:
    """Units by first-order scores on the target's few samples."""
    generator = torch.Generator().manual_seed(target.seed)
    inputs = to_input(backbone, target.samples.images)
    return _select(backbone, _taylor(backbone.program, backbone.tracking, inputs, target, generator), target)


def amp_few_plan(backbone: Backbone, target: Target) -> Plan:
    """Units by scores learnt on the target's few samples, as a record's are on many."""
    scores = learn_scores(backbone, target.samples, classes=target.classes, seed=target.seed, settings=ScoreSettings())
    return _select(backbone, scores.groups, target)


PLANNERS: Mapping[str, Callable[[Backbone, Target], Plan]] = {
    "l1": l1_plan,
    "random": random_plan,
    "taylor": taylor_plan,
    "amp_few": amp_few_plan,
}


def iterative(
    backbone: Backbone,
    target: Target,
    settings: RecoverSettings,
    *,
    rounds: int = 3,
    progress: Progress = no_progress,
) -> IterativeResult:
    """Cut a little by first-order scores, recover, and again, until the size is reached.

    Every round cuts by the same factor and is recovered like a one-shot cut: repair, head, iterations. Only after the
    last one the weights go less than all of the way that the iterations lead: what a round learns is not halved.

    Args:
        backbone: stays as it is.
        target: task and size.
        settings: of the recovery of every round.
        rounds: at least 1; one round is one-shot Taylor pruning.
        progress: told about rounds.

    Raises:
        InputError: fewer than one round.
        BudgetError: the size is below the floors.
    """
    if rounds < 1:
        raise InputError(f"iterative pruning needs at least one round, got {rounds}")
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(target.seed)
    inputs = to_input(backbone, target.samples.images)
    program, plan = backbone.program, Plan.full(backbone.layout)
    dense = backbone.costs.parameters({})
    wanted = target.keep_parameters if isinstance(target.keep_parameters, int) else int(target.keep_parameters * dense)
    for done in range(1, rounds + 1):
        tracking = track(program, cuttable_output=True)
        scores = _taylor(program, tracking, inputs, target, generator)
        size = wanted if done == rounds else round(dense * (wanted / dense) ** (done / rounds))
        step = select(scores, tracking.layout, CostModel.from_tracking(tracking), size)
        small = cut_and_repair(Blank(program, tracking, step), inputs, settings, generator)
        how = settings if done == rounds else replace(settings, way=1.0)
        model, losses = recover(small, inputs, target.samples, target.classes, how, generator)
        plan, program = _followed_by(backbone, plan, step), model.features
        progress(done, rounds)
    recovered = Recovered(model, plan, losses, time.perf_counter() - start)
    return IterativeResult(recovered, (rounds - 1) * settings.iterations)


def _taylor(
    program: fx.GraphModule, tracking: Tracking, inputs: Tensor, target: Target, generator: torch.Generator
) -> ScoreMap:
    """First-order scores under a fresh ridge head: a tuned head fits its few samples, and gradients vanish there."""
    labels = target.samples.labels
    head = fit_ridge_head(run_batched(program, inputs).numpy(), labels, target.classes)
    return taylor_scores(program, tracking, head, inputs, torch.from_numpy(labels), generator=generator)


def _filter_norms(backbone: Backbone) -> list[tuple[Group, npt.NDArray[np.float64]]]:
    """For every group, the L1 norm of the weights that make each unit, over all layers that make it."""
    found = []
    for group in backbone.layout.groups:
        atom = backbone.tracking.atoms[group.name]
        norms = np.zeros(group.size)
        for member in group.members:
            tensor = tensor_of(backbone.program, member.parameter).detach()
            if member.axis != 0 or tensor.dim() < 2:
                continue  # not an output axis of a weight
            rows = tensor.abs().flatten(1).sum(dim=1).double().numpy()
            dim = backbone.tracking.tensors[member.parameter][0]
            for unit in range(group.size):
                norms[unit] += rows[indices(dim, {atom: np.array([unit])})].sum()
        found.append((group, norms))
    return found


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Ranks between 0 and 1, so that one threshold cuts the same share of every group."""
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ((order + 0.5) / len(values)).astype(np.float32)


def _select(backbone: Backbone, scores: ScoreMap, target: Target) -> Plan:
    return select(scores, backbone.layout, backbone.costs, target.keep_parameters)


def _followed_by(backbone: Backbone, first: Plan, second: Plan) -> Plan:
    """One plan for the dense layout that does what ``second`` does after ``first``."""
    kept = {name: [first.kept[name][unit] for unit in units] for name, units in second.kept.items()}
    return Plan.of(backbone.layout, {**first.kept, **kept})
