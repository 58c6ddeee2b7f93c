"""One scale for votes of different kinds.

Learnt scores are root mean squares of gradients, all in one unit, and their level tells groups apart. Scores that were
read off a checkpoint are norms of weights: only the order within a group means something. Such a vote keeps its
order and takes the values that the learnt votes have in the group: its best unit counts as much as the best one of
their mean. Units with equal scores, such as those that a pruned checkpoint lacks, share the mean of their places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from kiridashi_server.amp.scores import ScoreArray, ScoreMap


def on_one_scale(votes: Sequence[ScoreMap], learnt: Sequence[bool], own: ScoreMap | None = None) -> list[ScoreMap]:
    """The votes, those that are not learnt with the learnt ones' values; learnt ones are returned as they are.

    Args:
        votes: scores by group, float32 [size].
        learnt: which of them are learnt.
        own: the task's own learnt scores, the scale where no vote is learnt. Without those, too, every group has
            mean 1, and groups cannot be told apart.
    """
    guides = [vote for vote, is_learnt in zip(votes, learnt, strict=True) if is_learnt] or ([own] if own else [])
    if all(learnt):
        return list(votes)
    level = {name: np.mean([guide[name] for guide in guides], axis=0) for name in guides[0]} if guides else {}
    return [
        vote if is_learnt else {name: _with_values(values, level.get(name)) for name, values in vote.items()}
        for vote, is_learnt in zip(votes, learnt, strict=True)
    ]


def _with_values(scores: ScoreArray, level: ScoreArray | None) -> ScoreArray:
    if level is None or level.shape != scores.shape:
        mean = float(scores.mean(dtype=np.float64))
        return scores / np.float32(mean) if mean > 0 else np.ones(len(scores), dtype=np.float32)
    places = rankdata(scores, method="average") - 1
    matched: ScoreArray = np.interp(places, np.arange(len(level)), np.sort(level)).astype(np.float32)
    return matched
