"""Evidence: each record's similarity to a new task, its weight, and whether reuse is justified, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.measure import Measure, what_is_missing

VerdictName: TypeAlias = Literal["reuse", "blend", "fallback"]


@dataclass(frozen=True)
class EvidenceSettings:
    """How similarities become weights and a verdict.

    Attributes:
        tilt: how strongly similarity moves weights away from uniform: a record one standard deviation more
            similar than the mean weighs ``exp(tilt)`` times as much. 0 gives the uniform bank.
        influence_limit: the largest weight of one record, as long as the bank has enough records for it.
        reuse_from: records needed for a verdict of reuse; one or two are an anecdote.
    """

    tilt: float = 0.0
    influence_limit: float = 0.4
    reuse_from: int = 3

    def __post_init__(self) -> None:
        if self.tilt < 0 or not 0 < self.influence_limit <= 1 or self.reuse_from < 1:
            raise InputError(
                f"evidence settings are out of range: {self}",
                why="tilt is at least 0, the influence limit in (0, 1], reuse_from at least 1",
            )


@dataclass(frozen=True)
class EvidenceItem:
    """One record's part: its similarity, its weight (all weights sum to 1), and the reason in words."""

    record_id: str
    task: str
    similarity: float
    weight: float
    reason: str


@dataclass(frozen=True)
class Evidence:
    """What the bank has to say about a new task.

    Attributes:
        items: usable records, most similar first.
        verdict: ``reuse`` the bank's scores, ``blend`` them with the task's own, or ``fallback`` to those alone.
        reason: why, in words.
        measure: the similarity measure used.
        zero_point: similarity at which a record is no better than knowing nothing, if the measure has one.
        left_out: records that cannot be used, with the reason.
        silent: records of this backbone that the measure cannot judge: id, task, and the reason.
    """

    items: tuple[EvidenceItem, ...]
    verdict: VerdictName
    reason: str
    measure: str
    zero_point: float | None
    left_out: tuple[tuple[str, str], ...] = ()
    silent: tuple[tuple[str, str, str], ...] = ()


def weigh(
    records: Sequence[Record],
    target: Descriptor,
    measure: Measure,
    *,
    fingerprint: str,
    layout_digest: str,
    settings: EvidenceSettings = EvidenceSettings(),
) -> Evidence:
    """Compare every record with the target.

    Args:
        records: of any backbone; those of another one are left out and named. Those that lack what the measure needs
            are silent: they have no similarity, and vote as average records in a composition.
        target: the new task's samples.
        measure: similarity measure.
        fingerprint: the backbone in use.
        layout_digest: its layout.
        settings: weights and verdict.
    """
    usable, left_out = usable_records(records, fingerprint, layout_digest)
    lacking = {record.id: why for record in usable if (why := what_is_missing(measure, record, target))}
    silent = tuple((record.id, record.task, lacking[record.id]) for record in usable if record.id in lacking)
    usable = [record for record in usable if record.id not in lacking]
    zero = measure.zero_point(target)
    similarities = np.array([measure.similarity(record, target) for record in usable])
    weights = tilted_weights(similarities, settings.tilt, settings.influence_limit)
    order = sorted(range(len(usable)), key=lambda i: (-similarities[i], usable[i].task, usable[i].id))
    items = tuple(
        EvidenceItem(
            usable[i].id,
            usable[i].task,
            float(similarities[i]),
            float(weights[i]),
            _reason(float(similarities[i]), zero, measure.name),
        )
        for i in order
    )
    verdict, reason = _verdict(items, zero, settings, len(left_out))
    if silent and not items:
        verdict, reason = "blend", f"{measure.name} can judge none of the bank's {len(silent)} records of this backbone"
    return Evidence(items, verdict, reason, measure.name, zero, left_out, silent)


def tilted_weights(similarities: npt.NDArray[np.float64], tilt: float, limit: float) -> npt.NDArray[np.float64]:
    """Weights that sum to 1: ``exp(tilt * z)`` for the standardised similarities z, none above ``limit``.

    What a record has above the limit is given to the others in proportion. With fewer than ``1 / limit`` records the
    limit is the uniform weight.
    """
    count = len(similarities)
    if count == 0:
        return np.zeros(0)
    spread = similarities.std()
    z = (similarities - similarities.mean()) / spread if spread > 0 else np.zeros(count)
    weights: npt.NDArray[np.float64] = np.exp(tilt * (z - z.max()))
    weights /= weights.sum()
    ceiling = max(limit, 1 / count)
    held = np.zeros(count, dtype=bool)
    while (weights > ceiling * (1 + 1e-12)).any():
        held |= weights > ceiling
        weights[held] = ceiling
        free = weights[~held].sum()
        if free > 0:
            weights[~held] *= (1 - ceiling * held.sum()) / free
    return weights


def usable_records(
    records: Sequence[Record], fingerprint: str, layout_digest: str
) -> tuple[list[Record], tuple[tuple[str, str], ...]]:
    """Records of this backbone and layout, and the others by task with the reason."""
    usable: list[Record] = []
    left_out: list[tuple[str, str]] = []
    for record in records:
        if record.backbone_fingerprint != fingerprint:
            left_out.append((record.task, f"learnt on another backbone, {record.backbone_fingerprint}"))
        elif record.layout_digest != layout_digest:
            left_out.append((record.task, f"learnt for another layout, {record.layout_digest}"))
        else:
            usable.append(record)
    return usable, tuple(left_out)


def _reason(similarity: float, zero: float | None, measure: str) -> str:
    if zero is None:
        return f"{measure} {similarity:.3f}"
    if measure != "loo-leep":
        return f"{measure} {similarity:.3f}; {zero:.3f} is knowing nothing"
    gain = similarity - zero
    if gain > 0:
        return f"its classes foretell the new ones {gain:.2f} nats better than knowing nothing"
    return f"its classes say nothing about the new ones ({-gain:.2f} nats worse than knowing nothing)"


def _verdict(
    items: Sequence[EvidenceItem], zero: float | None, settings: EvidenceSettings, left_out: int
) -> tuple[VerdictName, str]:
    if not items:
        reason = (
            f"none of its {left_out} records is of this backbone and layout"
            if left_out
            else "it has no record of this backbone"
        )
        return "fallback", f"the bank cannot help: {reason}"
    count = f"{len(items)} record" + ("s" if len(items) > 1 else "")
    if len(items) < settings.reuse_from:
        return "blend", f"the bank has only {count} of this backbone; reuse alone needs {settings.reuse_from}"
    if zero is None:
        return "reuse", f"the bank has {count} of this backbone; the measure has no zero point to judge them by"
    telling = sum(item.similarity > zero for item in items)
    if telling == 0:
        return "blend", f"none of the bank's {count} says more about the new task than knowing nothing"
    return "reuse", f"{telling} of the bank's {count} foretell the new task better than knowing nothing"
