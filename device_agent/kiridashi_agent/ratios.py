"""Which of several models is faster, and by how much: ratios of interleaved times, each with an interval.

In every round each model had one turn, so what disturbs a round disturbs them all, and a ratio is taken within its
round. The middle one over all rounds counts. Its interval is a bootstrap's over blocks of consecutive rounds (Künsch
1989), because a machine's state lasts longer than a round. Several models are compared with the first one at once, so
each interval is wider: all of them hold together with 95 % (Bonferroni).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kiridashi_agent.jobs import Ratio

CHANCE = 0.05
_DRAWS = 2000


def ratios(times_ms: NDArray[np.float64], rng: np.random.Generator) -> tuple[Ratio, ...]:
    """The time of every model but the first over the first one's, from times [rounds, models]."""
    logs = np.log(times_ms[:, 1:]) - np.log(times_ms[:, :1])
    rounds, others = logs.shape
    block = max(1, round(rounds ** (1 / 3)))
    starts = rng.integers(0, rounds - block + 1, (_DRAWS, -(-rounds // block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(_DRAWS, -1)[:, :rounds]
    chance = CHANCE / max(others, 1)
    found = []
    for column in logs.T:
        low, high = np.quantile(np.median(column[drawn], axis=1), [chance / 2, 1 - chance / 2])
        found.append(Ratio(*(float(np.exp(value)) for value in (np.median(column), low, high))))
    return tuple(found)
