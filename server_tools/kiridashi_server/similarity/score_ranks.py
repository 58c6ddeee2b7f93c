"""Rank correlation of first-order scores: do both tasks ask the same units of the backbone?

Spearman's correlation between the new task's first-order scores, from its few samples, and the record's, in every
group; their mean, weighted by the groups' units. First-order scores are the diagonal Fisher information of the gates,
so this is Task2Vec (Achille et al. 2019, arXiv 1902.03545) with ranks in place of its distance and the backbone itself
as the probe. Ranks are taken within groups: scores of different layers differ in size for every task alike.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need


def spearman(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> float:
    """Spearman's rank correlation of two vectors [n], ties at their mean rank; 0 where one of them is constant."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float(ranks[0] @ ranks[1]) / size if size > 0 else 0.0


def score_correlation(first: ScoreMap, second: ScoreMap) -> float:
    """The mean over common groups, weighted by units, of the scores' rank correlation; 0 without a common group."""
    common = [name for name in first if name in second]
    units = sum(len(first[name]) for name in common)
    return sum(len(first[name]) * spearman(first[name], second[name]) for name in common) / units if units else 0.0


class ScoreRanks:
    """The measure; needs the record's first-order scores and the task's."""

    name = "score-ranks"
    needs: tuple[Need, ...] = ("taylor",)

    def similarity(self, record: Record, target: Descriptor) -> float:
        """Mean rank correlation, in [-1, 1]."""
        return score_correlation(target.taylor, record.taylor)

    def zero_point(self, target: Descriptor) -> float | None:
        """None: a part of the ranking is common to all tasks, related or not."""
        del target
        return None
