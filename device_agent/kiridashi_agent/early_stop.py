"""When iterations end before their number is up, and whose weights are kept. Pure.

The weights of the last iteration count, unless the hold-out says that earlier ones were better by more than chance
explains (McNemar's test, :mod:`kiridashi_agent.gate`). So a look at the hold-out chooses nothing as long as training
does no clear harm, and the verdict on what is kept stays honest. To keep simply the best of several looks would choose
luck; to set samples aside for it costs more than it wins where there are few, and the loss misleads: it grows with the
model's confidence while more and more answers become right.

The learning rate falls along half a cosine, so the gain comes late: the first look is after half of the iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kiridashi_agent.gate import SIGNIFICANCE, chance_of_loss

EVERY = 5
"""Iterations between two looks, at least."""
LOOK_SHARE = 0.2
"""What looking may take of the iterations' time, the looks at the start and at the end left out."""
BEGIN, PATIENCE = 1 / 2, 1 / 4
"""Of all iterations: before the first look, and after the last good one until they end."""
MOST = 128
"""Hold-out samples that are looked at; the verdict uses all."""


def looked_at(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the hold-out's samples [n] are looked at: of every class alike."""
    classes = np.unique(labels)
    chosen = np.zeros(len(labels), np.bool_)
    for label in classes:
        chosen[np.flatnonzero(labels == label)[: max(1, MOST // len(classes))]] = True
    return chosen


@dataclass
class Looks:
    """The looks so far, at iterations of which so many are ``planned``.

    ``kept`` is the last one that was not clearly worse than the best, ``last`` the last one.
    """

    planned: int
    kept: int = 0
    last: int = 0
    _best: NDArray[np.bool_] | None = None

    def take(self, iteration: int, right: NDArray[np.bool_]) -> bool:
        """Note which samples were right after so many iterations; whether these weights are to be kept."""
        self.last = iteration
        best = right if self._best is None else self._best
        wrong, mended = int((best & ~right).sum()), int((~best & right).sum())
        if wrong <= mended:
            self._best = right
        elif chance_of_loss(wrong, mended) < SIGNIFICANCE:
            return False
        self.kept = iteration
        return True

    def is_due(self, iteration: int) -> bool:
        """Whether it is time for another one."""
        return iteration >= BEGIN * self.planned and iteration - self.last >= EVERY

    @property
    def is_over(self) -> bool:
        """Whether the iterations should end."""
        return self.last - max(self.kept, BEGIN * self.planned) >= PATIENCE * self.planned
