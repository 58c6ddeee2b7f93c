"""A task of the bank plays new: a few of its samples, a bank and a stock that have never seen it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.budget.solver import plan_size
from kiridashi_server.graph.plan import Plan
from kiridashi_server.pipeline import compose_scores
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from kiridashi_server.stock.pieces import Stock
from kiridashi_server.tasks.task import Samples, Task

PER_CLASS = 6
SHARES = (0.3, 0.15)
"""Of the parameters: the sizes at which a task is cut."""

_QUARTER, _WANTED = 4, 4


@dataclass(frozen=True, eq=False)
class Played:
    """A task that plays new: its few samples, those that judge, its number of classes, and a plan for each size."""

    few: Samples
    judges: Samples
    classes: int
    plans: tuple[Plan, ...]


def hold_back(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Which tasks play new and which fill the bank: a quarter, by the order of their digests, and the others.

    A standard error of two or three differences is hardly one. So at least four play new, but at most half of all.

    Args:
        tasks: only one with a split ``val`` can play new.
    """
    ordered = sorted(tasks, key=lambda task: task.digest)
    able = [task for task in ordered if "val" in task.splits]
    new = able[: max(len(tasks) // _QUARTER, min(_WANTED, len(tasks) // 2))]
    return new, [task for task in ordered if task not in new]


def without(records: Sequence[Record], tasks: Sequence[Task]) -> list[Record]:
    """The records that are not of these tasks, by name or by digest."""
    names, digests = {task.name for task in tasks}, {task.digest for task in tasks}
    return [record for record in records if record.task not in names and record.provenance.task_digest not in digests]


def few_of(task: Task, seed: int) -> Samples:
    """Its few samples: six of each class, or as many as its smallest class has."""
    train = task.split("train")
    smallest = int(np.bincount(train.labels, minlength=len(task.labels)).min())
    return train.few_shot(min(PER_CLASS, smallest), seed)


def plans_of(backbone: Backbone, task: Task, records: Sequence[Record], seed: int) -> tuple[Plan, ...]:
    """What the bank, which must not know the task, would cut for it at each size."""
    _, composed = compose_scores(backbone, records, few_of(task, seed), len(task.labels), seed)
    dense = backbone.costs.parameters({})
    return tuple(plan_size(backbone.layout, backbone.costs, composed.scores, int(share * dense)) for share in SHARES)


def play(
    backbone: Backbone, task: Played, settings: RecoverSettings, stock: Stock | None, seed: int
) -> tuple[float, ...]:
    """Accuracy at each size, cut out of the stock or of the backbone as it is."""
    return tuple(
        accuracy(
            recover_cut(
                backbone,
                plan,
                task.few,
                classes=task.classes,
                settings=settings,
                seed=seed,
                blank=stock.blank(plan) if stock else None,
            ).model,
            backbone,
            task.judges,
        )
        for plan in task.plans
    )
