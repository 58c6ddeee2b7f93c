"""Composition: scores for a new task from the records' raw scores, and from its own where the bank is thin.

The default is the mean over all records. Single runs of score learning are mostly noise in their order, so what
averaging removes is worth more than what choosing the nearest task adds; similarity weights are a tilt that has to
earn its place. The mean is a winsorised one: a record whose score for a unit lies far from the others' is pulled
back, so that one poisoned or broken record cannot turn the result.

Records that the measure cannot judge, such as those read off a checkpoint, vote too, each as an average record; votes
of other kinds than learnt ones are put on the learnt ones' scale first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.bank.record import Record
from kiridashi_server.compose.calibration import on_one_scale
from kiridashi_server.compose.robust import DEFAULT_SETTINGS, ComposeSettings, limits
from kiridashi_server.compose.stack import ScoreStack
from kiridashi_server.similarity.evidence import Evidence, VerdictName


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
    settings: ComposeSettings = DEFAULT_SETTINGS,
    stack: ScoreStack | None = None,
) -> Composition:
    """Scores for the task that ``evidence`` is about.

    Args:
        evidence: weights and verdict.
        records: the records it speaks of (others are ignored).
        own: the task's own scores, of the same kind as the bank's (learnt from its few samples). They have one
            record's vote on a blend, and all votes on a fallback. A blend without them is the bank's mean.
        own_name: what they are called in the explanation.
        settings: robustness.
        stack: the records' scores, stacked with the default settings. It is used if it is of just the records that
            vote; the limits of a blend are then those of the records alone.

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
    weights = _weights(evidence)
    tasks = {item.record_id: item.task for item in evidence.items} | {name: task for name, task, _ in evidence.silent}
    if missing := [tasks[name] for name in weights if name not in by_id]:
        raise InputError(f"the evidence names a record of '{missing[0]}' that was not passed")
    with_own = evidence.verdict == "blend" and own is not None
    share = len(weights) / (len(weights) + with_own)
    weights = {name: share * weight for name, weight in weights.items()}
    extra = (own, 1 - share) if with_own and own is not None else None
    if stack is not None and settings == DEFAULT_SETTINGS and stack.covers(tuple(weights)):
        scores = stack.mean(weights, extra)
    else:
        scores = _mean([by_id[name] for name in weights], list(weights.values()), extra, settings)
    explanation = _explain(evidence, len(weights), own_name if with_own else "")
    return Composition(scores, weights | ({"own": 1 - share} if with_own else {}), evidence.verdict, explanation)


def _weights(evidence: Evidence) -> dict[str, float]:
    """Weights by record id that sum to 1; a record without a similarity counts as an average one."""
    judged, silent = len(evidence.items), len(evidence.silent)
    share = judged / (judged + silent)
    weights = {item.record_id: share * item.weight for item in evidence.items}
    return weights | {record_id: 1 / (judged + silent) for record_id, _, _ in evidence.silent}


def _mean(
    records: Sequence[Record], weights: list[float], extra: tuple[ScoreMap, float] | None, settings: ComposeSettings
) -> dict[str, npt.NDArray[np.float32]]:
    own = extra[0] if extra else None
    votes = on_one_scale([record.scores for record in records], [record.kind == "learnt" for record in records], own)
    if extra:
        votes, weights = [*votes, extra[0]], [*weights, extra[1]]
    return robust_mean(votes, np.array(weights), settings)


def robust_mean(
    votes: Sequence[ScoreMap], weights: npt.NDArray[np.float64], settings: ComposeSettings = DEFAULT_SETTINGS
) -> dict[str, npt.NDArray[np.float32]]:
    """The weighted mean of scores, unit by unit, outliers pulled back to the limits (:func:`limits`).

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
        stacked = np.clip(stacked, *limits(stacked, settings))
        combined[name] = (weights[:, None] * stacked).sum(axis=0).astype(np.float32)
    return combined


def _explain(evidence: Evidence, voters: int, own_name: str) -> str:
    parts = [f"{evidence.verdict}: {evidence.reason}"]
    if evidence.items:
        effective = 1 / sum(item.weight**2 for item in evidence.items)
        parts.append(f"mean of {len(evidence.items)} records' scores, worth {effective:.1f} equal ones")
    if voters > len(evidence.items):
        parts.append(f"with {voters - len(evidence.items)} that {evidence.measure} cannot judge as average ones")
    if own_name:
        parts.append(f"with {own_name} as one more vote")
    best = max(evidence.items, key=lambda item: item.weight, default=None)
    if best is not None and best.weight > 1.01 / len(evidence.items):
        parts.append(f"'{best.task}' weighs most ({best.weight:.0%})")
    return "; ".join(parts)
