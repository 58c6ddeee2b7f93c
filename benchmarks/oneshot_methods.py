"""Ways from a new task's few samples to a small model, each timed from the samples on.

Seconds are of the processor, with one thread: they do not grow when other programs keep the machine busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from kiridashi_server.amp.learning import learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.amp.taylor import taylor_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.baselines import Target, iterative, l1_plan, random_plan
from kiridashi_server.graph.plan import Plan
from kiridashi_server.pipeline import compose_scores
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import Recovered, RecoverSettings, accuracy, recover_cut
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.stock.pieces import Stock
from kiridashi_server.tasks import Samples

from benchmarks.global_pruning import global_plan, lite0_module, task_head, with_gradients
from benchmarks.oneshot_chain import Chain
from benchmarks.oneshot_limits import Limit, ShareLimit, largest

MULTIPLE = 8
_TRIES = 4


@dataclass(frozen=True, eq=False)
class Line:
    """A new line: its few samples, those that judge, classes, and how large its model may be."""

    samples: Samples
    test: Samples
    classes: int
    limit: Limit
    seed: int


@dataclass(frozen=True, eq=False)
class Contest:
    """One line on one chain, with the methods that compete for it."""

    chain: Chain
    line: Line

    def run(self, method: str, iterations: int) -> dict[str, Any]:
        """Accuracy on the test images, processor seconds from samples to model, and the size of what came out."""
        settings = RecoverSettings(iterations=iterations)
        self.chain.records  # noqa: B018 - what lines share is there before the clock starts
        stock: Stock | None = getattr(self.chain, STOCKS[method]) if method in STOCKS else None
        start = time.process_time()
        if method in ITERATIVE:
            recovered, extra, seconds = self._pruned_in_steps(ITERATIVE[method], settings)
        else:
            recovered, extra = self._cut_once(method, settings, stock), 0
            seconds = time.process_time() - start
        counts = recovered.plan.counts
        costs = self._backbone.costs
        return {
            "accuracy": accuracy(recovered.model, self._backbone, self.line.test),
            "seconds": seconds,
            "extra_iterations": extra,
            "parameters": costs.parameters(counts) / costs.parameters({}),
            "macs": costs.macs(counts) / costs.macs({}),
            "widths": dict(counts),
        }

    def _pruned_in_steps(self, tuned: bool, settings: RecoverSettings) -> tuple[Recovered, int, float]:
        """Iterative pruning to as many parameters as one cut by Taylor scores keeps inside the limit.

        What a device needs depends on more than that; where the result is over, fewer are kept, and the seconds are
        those of the last try.
        """
        backbone, line = self.chain.tuned if tuned else self._backbone, self.line
        size = backbone.costs.parameters(self.taylor().counts)
        for _ in range(_TRIES):
            start = time.process_time()
            result = iterative(backbone, Target(line.samples, line.classes, size, line.seed), settings)
            seconds = time.process_time() - start
            if line.limit.holds(result.recovered.plan.counts):
                return result.recovered, result.extra_iterations, seconds
            size = int(0.94 * size)
        raise ValueError(f"iterative pruning found no cut inside the limit '{line.limit.name}' in {_TRIES} tries")

    def _cut_once(self, method: str, settings: RecoverSettings, stock: Stock | None) -> Recovered:
        line, plan = self.line, PLANNERS[method](self)
        return recover_cut(
            self._backbone,
            plan,
            line.samples,
            classes=line.classes,
            settings=settings,
            seed=line.seed,
            blank=stock.blank(plan) if stock else None,
        )

    @property
    def _backbone(self) -> Backbone:
        return self.chain.backbone

    def _solved(self, scores: ScoreMap) -> Plan:
        return self.line.limit.solved(scores)

    def _of_share(self, planner: Callable[[Backbone, Target], Plan]) -> Plan:
        """The largest plan inside the limit of a planner that takes a share of the parameters."""
        line = self.line

        def plan(share: float) -> Plan:
            return planner(self._backbone, Target(line.samples, line.classes, share, line.seed))

        if isinstance(line.limit, ShareLimit):
            return plan(line.limit.percent / 100)
        return largest(line.limit, plan)

    def taylor(self) -> Plan:
        """First-order scores on the line's samples."""
        backbone, line = self._backbone, self.line
        inputs = to_input(backbone, line.samples.images)
        head = fit_ridge_head(run_batched(backbone.program, inputs).numpy(), line.samples.labels, line.classes)
        labels, generator = torch.from_numpy(line.samples.labels), torch.Generator().manual_seed(line.seed)
        scores = taylor_scores(backbone.program, backbone.tracking, head, inputs, labels, generator=generator)
        return self._solved(scores)

    def amp_few(self) -> Plan:
        """Scores learnt on the line's samples."""
        line = self.line
        return self._solved(learn_scores(self._backbone, line.samples, classes=line.classes, seed=line.seed).groups)

    def uniform_bank(self) -> Plan:
        """The mean of the bank's scores."""
        return self._solved(self.chain.mean)

    def composed(self) -> Plan:
        """What the product composes of the bank and the line's samples."""
        line = self.line
        _, mix = compose_scores(self._backbone, self.chain.records, line.samples, line.classes, line.seed)
        return self._solved(mix.scores)

    def l1(self) -> Plan:
        """The same share of every group, filters of largest L1 norm."""
        return self._of_share(l1_plan)

    def random(self) -> Plan:
        """The same share of every group, at random."""
        return self._of_share(random_plan)

    def tp(self, method: str) -> Plan:
        """torch-pruning's global pruning: the ratio whose cut is the largest inside the size, by bisection."""
        backbone, line = self._backbone, self.line
        module = lite0_module(backbone, task_head(backbone, line.samples, line.classes))
        module = with_gradients(module, backbone, line.samples)

        def plan(share: float) -> Plan:
            return global_plan(module, backbone, method, 1 - share, multiple=MULTIPLE)

        return largest(line.limit, plan)


PLANNERS: Mapping[str, Callable[[Contest], Plan]] = {
    "product": Contest.composed,
    "composed": Contest.composed,
    "uniform_bank": Contest.uniform_bank,
    "nested_l1": Contest.l1,
    "tuned_taylor": Contest.taylor,
    "random": Contest.random,
    "l1": Contest.l1,
    "taylor": Contest.taylor,
    "amp_few": Contest.amp_few,
    "tp_taylor": lambda contest: contest.tp("tp-taylor"),
    "tp_magnitude": lambda contest: contest.tp("tp-magnitude"),
}
"""How each method chooses; all are repaired, get a ridge head and the same iterations."""

STOCKS: Mapping[str, str] = {"product": "stock", "nested_l1": "nested_l1", "tuned_taylor": "stock"}
"""Methods whose cut is made out of pieces that were tuned on past tasks; the others cut the backbone as it is.

``nested_l1`` stands for networks of elastic width, like once-for-all: channels by L1 norm, the same share everywhere,
tuned size after size on the same tasks. ``tuned_taylor`` is the control for what tuning alone brings: the line's own
first-order scores, cut out of the smallest piece that has the units, which is the whole tuned backbone as a rule.
"""

ITERATIVE: Mapping[str, bool] = {"task_specific": False, "tuned_task_specific": True}
"""Step-by-step pruning on the line's samples, and whether it starts from the backbone tuned on past tasks."""

METHODS = (*PLANNERS, *ITERATIVE)
