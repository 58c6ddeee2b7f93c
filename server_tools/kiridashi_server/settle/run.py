"""Settling in stages, so that a long settling goes on where it stopped.

A stock was trained on the bank's tasks, and to them every iteration on top of it is superfluous. So a quarter of the
tasks is held back, a smaller stock is made from the others in the same way, and the held-back ones play new.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.cut_run import Bar
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.iterations import RecoverSettings
from kiridashi_server.settle.choice import FEWEST_NEW, PLAYED, Choice, Play, settle, unsettled
from kiridashi_server.settle.playing import PER_CLASS, SHARES, Played, few_of, hold_back, plans_of, play, without
from kiridashi_server.settle.store import Settled
from kiridashi_server.stages import Workspace
from kiridashi_server.stock.pieces import Stock, StockSettings
from kiridashi_server.stock.run import run_stock
from kiridashi_server.tasks.task import Task

CELL = "cell-"
"""Stages whose name starts so are measured cells."""

FEWEST_TASKS = 4
"""With fewer there is nothing to choose by: two that play new, and two that fill the smaller stock."""


class _Plans(msgspec.Struct, frozen=True):
    plans: tuple[str, ...]


class _Accuracies(msgspec.Struct, frozen=True):
    by_size: tuple[float, ...]


def run_settling(
    workspace: Workspace,
    backbone: Backbone,
    tasks: Sequence[Task],
    records: Sequence[Record],
    settings: StockSettings,
    seed: int,
    bar: Bar,
) -> Settled:
    """Settle how cuts of this backbone are recovered, with a stock made by ``settings`` and without one.

    Args:
        workspace: of the settling alone; keeps the pieces of the smaller stock and every measured cell.
        backbone: stays as it is.
        tasks: of the bank, those that its stock was made from.
        records: of this backbone; those of tasks that play new are left out.
        settings, seed: those of the stock that the result is for.
        bar: shows progress.

    Raises:
        InputError: no record of another task is of this backbone.
        StockError: a finished piece was changed.
    """
    new, others = hold_back(tasks)
    start = len(workspace.times)
    if len(tasks) < FEWEST_TASKS or len(new) < FEWEST_NEW:
        why = f"{len(new)} of {len(tasks)} tasks could play new, {FEWEST_NEW} of {FEWEST_TASKS} are needed"
        with_stock = without_stock = unsettled(why)
        new = []
    else:
        known = without(records, new)
        stock = run_stock(workspace, backbone, others, known, settings, seed, bar)
        with_stock, without_stock = _Settling(workspace, backbone, new, known, seed).choices(stock, bar)
    return Settled(
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        input_size=backbone.input_size,
        tasks={task.name: task.digest for task in tasks},
        stock=settings,
        seed=seed,
        played=tuple(task.name for task in new),
        with_stock=with_stock,
        without_stock=without_stock,
        seconds=sum(stage.seconds for stage in workspace.times[start:]),
    )


@dataclass(frozen=True, eq=False)
class _Settling:
    """The cells: every task that plays new, with every option, out of the stock and out of the backbone."""

    workspace: Workspace
    backbone: Backbone
    new: Sequence[Task]
    records: Sequence[Record]
    seed: int

    def choices(self, stock: Stock, bar: Bar) -> tuple[Choice, Choice]:
        """For lines that are cut out of a stock, and for the others."""
        total = 2 * PLAYED * len(self.new)
        with bar("recoveries") as advance:
            done = itertools.count(1)

            def told() -> None:
                advance(next(done), total)

            return settle(self._player(stock, told)), settle(self._player(None, told))

    def _player(self, stock: Stock | None, told: Callable[[], None]) -> Play:
        def played(settings: RecoverSettings) -> list[float]:
            means = []
            for number in range(len(self.new)):
                means.append(float(np.mean(self._cell(number, settings, stock))))
                told()
            return means

        return played

    def _cell(self, number: int, settings: RecoverSettings, stock: Stock | None) -> tuple[float, ...]:
        task = self._tasks[number]

        def work(_: Path) -> _Accuracies:
            return _Accuracies(play(self.backbone, task, settings, stock, self.seed))

        plans = [plan.to_json() for plan in task.plans]
        inputs = [*self._identity(number), plans, settings, stock.digest if stock else ""]
        kind = "stock" if stock else "backbone"
        name = f"{CELL}{number + 1}-{kind}-{settings.iterations}-{settings.way:g}"
        name += f"-{settings.ridge:g}-{settings.repair_strength:g}"
        return self.workspace.run(name, inputs, work, _Accuracies).by_size

    @cached_property
    def _tasks(self) -> list[Played]:
        return [self._played(number) for number in range(len(self.new))]

    def _played(self, number: int) -> Played:
        task = self.new[number]

        def work(_: Path) -> _Plans:
            plans = plans_of(self.backbone, task, self.records, self.seed)
            return _Plans(tuple(plan.to_json() for plan in plans))

        inputs = [*self._identity(number), sorted(record.id for record in self.records)]
        made = self.workspace.run(f"settle-task-{number + 1}", inputs, work, _Plans)
        plans = tuple(Plan.from_json(text) for text in made.plans)
        return Played(few_of(task, self.seed), task.split("val"), len(task.labels), plans)

    def _identity(self, number: int) -> list[object]:
        backbone = self.backbone
        return [backbone.fingerprint, backbone.input_size, self.new[number].digest, PER_CLASS, SHARES, self.seed]
