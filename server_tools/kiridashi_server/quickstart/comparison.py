"""The line's cut out of the stock, beside other ways to the same size that cut the backbone as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.bank.record import Record
from kiridashi_server.baselines import PLANNERS, Target, iterative
from kiridashi_server.budget.solver import plan_size
from kiridashi_server.cut_run import Bar, CutRun
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.iterations import Recovered, RecoverSettings, correct, recover_cut
from kiridashi_server.similarity.assess import mean_scores
from kiridashi_server.tasks import Task

OWN, UNIFORM, ITERATIVE = "one-shot", "uniform bank", "task-specific iterative"
METHODS = (OWN, UNIFORM, "l1", "random", ITERATIVE)


class Compared(msgspec.Struct, frozen=True):
    """One method's model on the line's test images: which ones it got right, and what it took.

    ``size`` is the number of parameters that was asked for, ``parameters`` what the cut kept.
    """

    method: str
    size: int
    parameters: int
    macs: int
    iterations: int
    extra_iterations: int
    seconds: float
    same_as_own: bool
    right: list[bool]


class Comparison:
    """All methods on one task, with the same samples and treatment; only the one-shot cut has the stock.

    Args:
        run: the run whose composition and recovery settings are used.
        records: the bank's records.
        task: its ``test`` split judges.
        others: how the cuts of the other methods are recovered.
        bar: shows progress.
    """

    def __init__(self, run: CutRun, records: Sequence[Record], task: Task, others: RecoverSettings, bar: Bar) -> None:
        self._run = run
        self._records = records
        self._task = task
        self._others = others
        self._bar = bar
        self._costs = run.request.backbone.costs

    @property
    def dense_parameters(self) -> int:
        """Parameters of the uncut feature extractor."""
        return self._costs.parameters({})

    def work(self, method: str, size: int) -> Callable[[Path], Compared]:
        """The stage that measures one method at one size."""

        def compared(_: Path) -> Compared:
            start = time.perf_counter()
            recovered, extra = self._make(method, size)
            seconds = time.perf_counter() - start
            backbone = self._run.request.backbone
            counts = recovered.plan.counts
            return Compared(
                method=method,
                size=size,
                parameters=self._costs.parameters(counts),
                macs=self._costs.macs(counts),
                iterations=self._settings(method).iterations,
                extra_iterations=extra,
                seconds=seconds,
                same_as_own=recovered.plan == self._plan(self._run.composed.score_map(), size),
                right=correct(recovered.model, backbone, self._task.split("test")).tolist(),
            )

        return compared

    def _make(self, method: str, size: int) -> tuple[Recovered, int]:
        request = self._run.request
        target = Target(request.samples, len(request.release.labels), size, request.seed)
        with self._bar(method) as advance:
            if method == ITERATIVE:
                result = iterative(request.backbone, target, self._others, progress=advance)
                return result.recovered, result.extra_iterations
            plan = self._chosen(method, size, target)
            recovered = recover_cut(
                request.backbone,
                plan,
                request.samples,
                classes=target.classes,
                settings=self._settings(method),
                seed=request.seed,
                progress=advance,
                blank=request.stock.blank(plan) if request.stock and method == OWN else None,
            )
        return recovered, 0

    def _settings(self, method: str) -> RecoverSettings:
        return self._run.request.recover if method == OWN else self._others

    def _chosen(self, method: str, size: int, target: Target) -> Plan:
        if method == OWN:
            return self._plan(self._run.composed.score_map(), size)
        if method == UNIFORM:
            return self._plan(self._uniform, size)
        return PLANNERS[method](self._run.request.backbone, target)

    def _plan(self, scores: ScoreMap, size: int) -> Plan:
        """The plan of that many parameters; at the delivered size, scores like the composed ones give its plan."""
        planned = self._run.planned
        if size == planned.parameters and _equal(scores, self._run.composed.score_map()):
            return self._run.plan
        return plan_size(self._run.request.backbone.layout, self._costs, scores, size)

    @cached_property
    def _uniform(self) -> ScoreMap:
        return mean_scores(self._records)


def _equal(left: ScoreMap, right: ScoreMap) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
