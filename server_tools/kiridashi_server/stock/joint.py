"""Joint training: one set of features, tuned on many tasks at once, a head for each.

    L = E_{task t, batch of t} [ cross-entropy of h_t(f(x)) over the classes of t ]

A batch mixes tasks, each as often as any other; a sample is judged among its own task's classes only, so tasks do not
compete. Heads start from ridge regression. Normalisations keep their statistics, as in all recoveries after a repair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from kiridashi.errors import InputError
from torch import Tensor, fx, nn
from torch.nn import functional

from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.program import copy_program
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.descent import Schedule, descend
from kiridashi_server.recover.inputs import augment, run_batched, to_input
from kiridashi_server.recover.ridge import RidgeHead, fit_ridge_head
from kiridashi_server.tasks.task import Samples


@dataclass(frozen=True, eq=False)
class JointTasks:
    """The samples of several tasks as one set.

    Attributes:
        inputs: float32 [N, 3, H, W], normalised.
        labels: int64 [N], counted through over all tasks.
        tasks: int64 [N], the number of the task.
        owners: int64 [C], the task that each class belongs to.
    """

    inputs: Tensor
    labels: Tensor
    tasks: Tensor
    owners: Tensor

    @classmethod
    def of(cls, backbone: Backbone, tasks: Sequence[Samples]) -> JointTasks:
        """Put tasks together.

        Raises:
            InputError: there is none, or images of another size than the backbone's.
        """
        if not tasks:
            raise InputError("joint training needs the samples of at least one task")
        classes = torch.tensor([int(samples.labels.max()) + 1 for samples in tasks])
        first = torch.cumsum(classes, 0) - classes
        numbers = torch.arange(len(tasks))
        return cls(
            inputs=torch.cat([to_input(backbone, samples.images) for samples in tasks]),
            labels=torch.cat([torch.from_numpy(samples.labels) + first[n] for n, samples in enumerate(tasks)]),
            tasks=torch.cat([numbers[n].repeat(len(samples)) for n, samples in enumerate(tasks)]),
            owners=torch.repeat_interleave(numbers, classes),
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of ``count`` samples, every task as often as any other however many it has, int64 [count].

        Within a task every sample is drawn once before any is drawn again.
        """
        turns = torch.arange(count) % (int(self.tasks.max()) + 1)
        rows = torch.empty(count, dtype=torch.int64)
        for number in range(int(self.tasks.max()) + 1):
            mine = torch.nonzero(self.tasks == number)[:, 0]
            places = torch.nonzero(turns == number)[:, 0]
            rounds = math.ceil(len(places) / len(mine))
            order = torch.cat([torch.randperm(len(mine), generator=generator) for _ in range(rounds)] or [mine[:0]])
            rows[places] = mine[order[: len(places)]]
        return rows[torch.randperm(count, generator=generator)]


def train_jointly(
    program: fx.GraphModule,
    tasks: JointTasks,
    schedule: Schedule,
    *,
    batch_size: int,
    generator: torch.Generator,
    progress: Progress = no_progress,
) -> fx.GraphModule:
    """A copy of ``program`` (features [N, D], in evaluation mode) with all weights tuned on the tasks.

    Args:
        program: cut or not, repaired if cut.
        tasks: what it is tuned on.
        schedule: how long and how fast.
        batch_size: augmented images a step, of mixed tasks.
        generator: of batches and augmentation.
        progress: told about steps.
    """
    tuned = copy_program(program).requires_grad_(True)
    head = _heads(program, tasks).requires_grad_(True)
    rows = iter(torch.split(tasks.draw(schedule.iterations * batch_size, generator), batch_size))

    def loss() -> Tensor:
        batch = next(rows)
        return _loss(head(tuned(augment(tasks.inputs[batch], generator))), tasks, batch)

    descend([*tuned.parameters(), *head.parameters()], loss, schedule, progress)
    return tuned.requires_grad_(False)


def _loss(logits: Tensor, tasks: JointTasks, rows: Tensor) -> Tensor:
    """The cross-entropy of these rows, each among the classes of its own task; logits [B, C] of all tasks' heads."""
    foreign = tasks.tasks[rows][:, None] != tasks.owners
    return functional.cross_entropy(logits.masked_fill(foreign, -torch.inf), tasks.labels[rows])


def _heads(program: fx.GraphModule, tasks: JointTasks) -> nn.Linear:
    """All tasks' ridge heads, one below the other."""
    features = run_batched(program, tasks.inputs).numpy()
    fitted = []
    for number in range(int(tasks.owners.max()) + 1):
        mine = (tasks.tasks == number).numpy()
        first, classes = int((tasks.owners < number).sum()), int((tasks.owners == number).sum())
        fitted.append(fit_ridge_head(features[mine], tasks.labels.numpy()[mine] - first, classes))
    return RidgeHead(
        np.concatenate([head.weight for head in fitted]), np.concatenate([head.bias for head in fitted])
    ).as_linear()
