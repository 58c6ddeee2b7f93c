"""Gradient descent as all recoveries do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kiridashi_server.graph.nodes import has_operator
from kiridashi_server.progress import Progress

_GRADIENT_NORM = 5.0
_LAYER_NORM_RATE, _HIGHEST_RATE, _RATE_AN_ITERATION = 1e-5, 1e-3, 5e-4 / 20


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        iterations: optimiser steps.
        learning_rate: of Adam, falling to zero along a cosine.
        warm_up: share of the iterations in which it rises linearly first.
    """

    iterations: int
    learning_rate: float
    warm_up: float = 0.0

    def rate(self, done: int) -> float:
        """The learning rate's factor after ``done`` steps."""
        rising = min(1.0, (done + 1) / (self.warm_up * self.iterations + 1))
        return rising * (1 + math.cos(math.pi * done / self.iterations)) / 2


def default_rate(program: fx.GraphModule, iterations: int) -> float:
    """A learning rate for all weights of ``program``.

    5e-4 for 20 iterations, in proportion for other numbers, at most 1e-3: a long run stands, and needs, a higher rate
    than a short one. 1e-5 for a model with layer normalisation, which larger steps destroy.
    """
    if has_operator(program, "layer_norm"):
        return _LAYER_NORM_RATE
    return min(_HIGHEST_RATE, _RATE_AN_ITERATION * iterations)


def descend(
    parameters: Iterable[Tensor], loss: Callable[[], Tensor], schedule: Schedule, progress: Progress
) -> tuple[float, ...]:
    """Take the schedule's steps (Adam, gradients clipped by their norm) down ``loss``, which draws its own batches.

    Returns:
        The loss of every step, before it was taken.
    """
    moved = list(parameters)
    optimiser = torch.optim.Adam(moved, lr=schedule.learning_rate)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.rate)
    losses = []
    for done in range(1, schedule.iterations + 1):
        value = loss()
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(moved, _GRADIENT_NORM)
        optimiser.step()
        rates.step()
        losses.append(float(value.detach()))
        progress(done, schedule.iterations)
    return tuple(losses)
