"""A bank, its records and the backbone they are for, named on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiridashi_server.bank.record import Record
from kiridashi_server.bank.rows import RecordSummary

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it pay
    from kiridashi_server.backbone import Backbone

SHORT = 12
"""Characters of an id or a fingerprint that are shown."""


def add_bank_argument(parser: argparse.ArgumentParser) -> None:
    """``--bank``."""
    parser.add_argument("--bank", type=Path, default=Path("bank"), metavar="DIR", help="the bank's folder")


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """The record, and ``--bank``."""
    parser.add_argument("record", help="a task's name, or the beginning of a record's id")
    add_bank_argument(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--bank``, ``--backbone`` and ``--image-size``."""
    add_bank_argument(parser)
    parser.add_argument("--backbone", default="efficientnet-lite0", metavar="NAME", help="a known backbone")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="side of the input")


def load_backbone(arguments: argparse.Namespace) -> Backbone:
    """The backbone that :func:`add_model_arguments` names."""
    import torch

    from kiridashi_server.backbone import Backbone

    torch.set_num_threads(1)  # the same numbers on every machine, and no spinning on a busy one
    return Backbone.load(arguments.backbone, image_size=arguments.image_size)


def row_data(record: Record | RecordSummary) -> dict[str, Any]:
    """A record as a row of ``--json``."""
    return {
        "id": record.id,
        "task": record.task,
        "kind": record.kind,
        "samples": record.samples,
        "outcomes": dict(record.outcomes),
        "seconds": record.provenance.seconds,
        "backbone_fingerprint": record.backbone_fingerprint,
        "policy": record.policy,
        "created": record.created,
    }


def row_text(row: Mapping[str, Any]) -> str:
    """What a record was made from and what was measured, from :func:`row_data`."""
    if row["kind"] != "learnt":
        return f"from a {row['kind']} checkpoint"
    return ", ".join([f"{row['samples']} samples", *(f"{name} {value:.1%}" for name, value in row["outcomes"].items())])


def others_text(backbones: Mapping[str, int], fingerprint: str) -> str:
    """How many records are of other backbones than this one, or nothing."""
    others = sum(count for name, count in backbones.items() if name != fingerprint)
    if not others:
        return ""
    return f"{others} records are of other backbones and were left out (same layout: kiridashi bank carry)"
