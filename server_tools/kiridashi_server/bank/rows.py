"""Rows of the database as records and summaries, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping

from kiridashi_server.amp.scores import ScoreArray, ScoreMap
from kiridashi_server.bank.record import Kind, Policy, Provenance, Record


@dataclass(frozen=True)
class RecordSummary:
    """What is known of a record without its arrays; the fields are those of :class:`Record`."""

    id: str
    task: str
    labels: tuple[str, ...]
    backbone_fingerprint: str
    layout_digest: str
    samples: int
    outcomes: Mapping[str, float]
    provenance: Provenance
    policy: Policy
    kind: Kind
    created: str


def row_of(record: Record | RecordSummary) -> dict[str, Any]:
    """The row that stores everything but the arrays."""
    return {
        "id": record.id,
        "task": record.task,
        "labels": list(record.labels),
        "backbone_fingerprint": record.backbone_fingerprint,
        "layout_digest": record.layout_digest,
        "samples": record.samples,
        "outcomes": dict(record.outcomes),
        "provenance": dataclasses.asdict(record.provenance),
        "policy": record.policy,
        "kind": record.kind,
        "created": record.created,
    }


def summary_of(row: RowMapping) -> RecordSummary:
    """The row as a summary."""
    return RecordSummary(**_plain(row))


def record_of(
    row: RowMapping | Mapping[str, Any], scores: ScoreMap, taylor: ScoreMap, descriptor: Mapping[str, ScoreArray]
) -> Record:
    """The row as a record with these arrays. It keeps the row's id, which need not be worked out again."""
    plain = _plain(row)
    identity = plain.pop("id")
    plain |= descriptor
    record = Record(**plain, scores=scores, taylor=taylor)
    record.__dict__["id"] = identity  # where the cached property looks first
    return record


def _plain(row: RowMapping | Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "labels": tuple(row["labels"]), "provenance": Provenance(**row["provenance"])}
