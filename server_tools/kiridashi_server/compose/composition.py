"""Composition: scores for a new task from the records' raw scores, and from its own where the bank is thin.

The default is the mean over all records. Single runs of score learning are mostly noise in their order, so what
averaging removes is worth more than what choosing the nearest task adds; similarity weights are a tilt that has to
earn its place. The mean is a winsorised one: a record whose score for a unit lies far from the others' is pulled
back, so that one poisoned or broken record cannot turn the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.evidence import Evidence, VerdictName

_NORMAL_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


@dataclass(frozen=True)
class ComposeSettings:
    """How scores are combined.

    Attributes:
        outlier_limit: a record's score may lie this many robust standard deviations from the median.
        robust_from: records needed before outliers can be told from spread.
    """

    outlier_limit: float = 3.0
    robust_from: int = 4


@dataclass(frozen=True, eq=False)
class Composition:
    """Scores for a new task and where they come from.

    Attributes:
        scores: by group, float32 [size].
        weights: by record id, and ``"own"`` for the task's own scores; they sum to 1.
        verdict: the evidence's verdict that was followed.
        explanation: all of it in words.
    """

    scores: ScoreMap
    weights: dict[str, float] = field(default_factory=dict)
    verdict: VerdictName = "fallback"
    explanation: str = ""


def compose(
    evidence: Evidence,
    records: Sequence[Record],
    *,
    own: ScoreMap | None = None,
    own_name: str = "few-shot scores",
    settings: ComposeSettings = ComposeSettings(),
) -> Composition:
    """Scores for the task that ``evidence`` is about.

    Args:
        evidence: weights and verdict.
        records: the records it speaks of (others are ignored).
        own: the task's own scores, of the same kind as the bank's (learnt from its few samples). They have one
            record's vote on a blend, and all votes on a fallback. A blend without them is the bank's mean.
        own_name: what they are called in the explanation.
        settings: robustness.

    Raises:
        InputError: a fallback without own scores, or a record the evidence names is missing.
    """
    if evidence.verdict == "fallback":
        if own is None:
            raise InputError(
                "there are no scores for this task",
                why=evidence.reason,
                next_step="pass the task's own scores, or fill the bank: kiridashi bank learn",
            )
        return Composition(own, {"own": 1.0}, "fallback", f"{own_name} alone, because {evidence.reason}")
    by_id = {record.id: record for record in records}
    missing = [item.task for item in evidence.items if item.record_id not in by_id]
    if missing:
        raise InputError(f"the evidence names a record of '{missing[0]}' that was not passed")
    votes = [by_id[item.record_id].scores for item in evidence.items]
    weights = np.array([item.weight for item in evidence.items])
    names = [item.record_id for item in evidence.items]
    if evidence.verdict == "blend" and own is not None:
        votes.append(own)
        weights = np.append(weights * len(names), 1.0) / (len(names) + 1)
        names.append("own")
    scores = robust_mean(votes, weights, settings)
    return Composition(
        scores,
        dict(zip(names, map(float, weights), strict=True)),
        evidence.verdict,
        _explain(evidence, names, own_name),
    )


def robust_mean(
    votes: Sequence[ScoreMap], weights: npt.NDArray[np.float64], settings: ComposeSettings = ComposeSettings()
) -> dict[str, npt.NDArray[np.float32]]:
    """The weighted mean of scores, unit by unit, outliers pulled back to a limit around the median.

    The scale of a unit's spread is its median absolute deviation over the votes, but not less than the median of that
    over its group: a unit on which most votes agree to the digit must not silence the rest.

    Raises:
        InputError: votes differ in groups or sizes, or their number is not that of the weights.
    """
    shapes = [{name: values.shape for name, values in vote.items()} for vote in votes]
    if not votes or len(votes) != len(weights) or any(shape != shapes[0] for shape in shapes):
        raise InputError(
            "these scores cannot be combined",
            why="they must be at least one, all with the same groups and sizes, each with a weight",
        )
    combined = {}
    for name in votes[0]:
        stacked = np.stack([vote[name].astype(np.float64) for vote in votes])
        if len(votes) >= settings.robust_from:
            middle = np.median(stacked, axis=0)
            spread = np.median(np.abs(stacked - middle), axis=0) * _NORMAL_MAD
            reach = settings.outlier_limit * np.maximum(spread, np.median(spread))
            stacked = np.clip(stacked, middle - reach, middle + reach)
        combined[name] = (weights[:, None] * stacked).sum(axis=0).astype(np.float32)
    return combined


def _explain(evidence: Evidence, names: Sequence[str], own_name: str) -> str:
    effective = 1 / sum(item.weight**2 for item in evidence.items)
    parts = [
        f"{evidence.verdict}: {evidence.reason}",
        f"mean of {len(evidence.items)} records' scores, worth {effective:.1f} equal ones",
    ]
    if "own" in names:
        parts.append(f"with {own_name} as one more vote")
    best = max(evidence.items, key=lambda item: item.weight)
    if best.weight > 1.01 / len(evidence.items):
        parts.append(f"'{best.task}' weighs most ({best.weight:.0%})")
    return "; ".join(parts)
