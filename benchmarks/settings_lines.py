"""New lines for the benchmark of settings: what each is cut to, and how well the recovered cut does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kiridashi_server.bank.record import Record
from kiridashi_server.graph.plan import Plan
from kiridashi_server.pipeline import compose_scores
from kiridashi_server.recover.descent import default_rate
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from kiridashi_server.stock.pieces import piece_plans
from kiridashi_server.stock.run import stock_scores
from kiridashi_server.tasks import Samples, Task

from benchmarks.oneshot_chain import Chain
from benchmarks.oneshot_limits import ShareLimit
from benchmarks.oneshot_methods import Contest, Line
from benchmarks.oneshot_tasks import load_task

TWICE, HALF = 2.0, 0.5
_IF_NONE = 20
"""Iterations in place of a chosen zero, which cannot be doubled."""


@dataclass(frozen=True, eq=False)
class NewLine:
    """One task at one size, with the past of a chain."""

    chain: Chain
    name: str
    percent: int
    per_class: int

    @cached_property
    def few(self) -> Samples:
        """Its few samples."""
        return self._task.split("train").few_shot(self.per_class, self.chain.seed)

    def composed(self, records: Sequence[Record]) -> Plan:
        """What the product cuts, knowing these records."""
        chain = self.chain
        _, composed = compose_scores(chain.backbone, records, self.few, len(self._task.labels), chain.seed)
        return self._limit.solved(composed.scores)

    def taylor(self) -> Plan:
        """What first-order scores on its few samples cut, without any past."""
        line = Line(self.few, self._task.split("test"), len(self._task.labels), self._limit, self.chain.seed)
        return Contest(self.chain, line).taylor()

    def accuracy(self, plan: Plan, settings: RecoverSettings, *, stock: bool) -> float:
        """On its test images, cut out of the chain's stock or of the backbone as it is."""
        chain = self.chain
        made = recover_cut(
            chain.backbone,
            plan,
            self.few,
            classes=len(self._task.labels),
            settings=settings,
            seed=chain.seed,
            blank=chain.stock.blank(plan) if stock else None,
        )
        return accuracy(made.model, chain.backbone, self._task.split("test"))

    @cached_property
    def _task(self) -> Task:
        return load_task(self.name, seed=self.chain.seed)

    @cached_property
    def _limit(self) -> ShareLimit:
        return ShareLimit(self.chain.backbone, self.percent)


def wrong(settings: RecoverSettings, chain: Chain) -> dict[str, RecoverSettings]:
    """The settings with one of them twice or half as large, by name; what takes no part without iterations is left out.

    The way ends at 1. Zero iterations cannot be doubled: 20 stand in for that.
    """
    found: dict[str, RecoverSettings] = {}
    for factor, suffix in ((TWICE, "x2"), (HALF, "x0.5")):
        for name, change in _CHANGES.items():
            found[f"{name}_{suffix}"] = change(settings, factor)
        if settings.iterations:
            rate = settings.learning_rate or default_rate(chain.backbone.program, settings.iterations)
            found[f"rate_{suffix}"] = replace(settings, learning_rate=factor * rate)
            found[f"iterations_{suffix}"] = replace(settings, iterations=int(factor * settings.iterations))
            found[f"way_{suffix}"] = replace(settings, way=min(1.0, factor * settings.way))
    if not settings.iterations:
        found[f"iterations_{_IF_NONE}"] = replace(settings, iterations=_IF_NONE)
    return {name: changed for name, changed in found.items() if changed != settings}


_CHANGES: Mapping[str, Callable[[RecoverSettings, float], RecoverSettings]] = {
    "ridge": lambda settings, factor: replace(settings, ridge=factor * settings.ridge),
    "repair_strength": lambda settings, factor: replace(settings, repair_strength=factor * settings.repair_strength),
    "repair_images": lambda settings, factor: replace(settings, repair_images=int(factor * settings.repair_images)),
}


def shared_units(chain: Chain, records: Sequence[Record]) -> float:
    """Share of the units of the stock's plans, all but the whole backbone's, that these records' plans have too."""
    plans = [
        piece_plans(chain.backbone, scores, chain.settings.shares)[1:]
        for scores in (chain.mean, stock_scores(chain.backbone, records))
    ]
    pairs = [
        (set(clean.kept[name]), set(other.kept[name]))
        for clean, other in zip(*plans, strict=True)
        for name in clean.kept
    ]
    return sum(len(clean & other) for clean, other in pairs) / sum(len(clean) for clean, _ in pairs)
