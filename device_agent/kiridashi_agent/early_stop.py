"""When iterations end before their number is up, and whose weights are kept. Pure.

A part of the samples to learn from is set aside for it, so the hold-out still judges one model, once. What looking
costs is bounded: an iteration's time for every :data:`EVERY` iterations, however many samples there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARE = 0.2
"""Of the samples of every class, how many are set aside."""
LEAST = 10
"""Samples that every class needs to learn from: with fewer, all of them are learnt from and nothing is set aside."""
EVERY = 5
"""Iterations between two looks, for each batch that is looked at."""
PATIENCE = 3
"""Looks in a row without a smaller loss after which the iterations end."""


def set_aside(labels: NDArray[np.int64], batch: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which samples [n] are set aside: as many of each class as fit a batch, at least one; none if a class is small.

    Args:
        labels: classes of the samples to learn from, n >= 1.
        batch: samples of an iteration.
        rng: draws them.
    """
    aside = np.zeros(len(labels), np.bool_)
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < LEAST:
        return aside
    for label, count in zip(classes, counts, strict=True):
        size = max(1, min(round(SHARE * int(count)), batch // len(classes)))
        aside[rng.permutation(np.flatnonzero(labels == label))[:size]] = True
    return aside


@dataclass
class Looks:
    """The looks so far: the smallest loss, the iterations before it, and how many looks ago that was."""

    best_loss: float = math.inf
    best_iteration: int = 0
    waited: int = 0

    def take(self, iteration: int, loss: float) -> bool:
        """Note a look after so many iterations; whether its loss is the smallest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_iteration, self.waited = loss, iteration, 0
            return True
        self.waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether the iterations should end."""
        return self.waited >= PATIENCE
