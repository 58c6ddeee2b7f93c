"""``kiridashi bank``: learn past tasks, look at what is known, compare a new task, check, forget."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiridashi.command import Command, Outcome
from kiridashi.errors import ExitCode

from kiridashi_server.bank.assessments import AssessmentStore
from kiridashi_server.bank.record import Record
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli.task_source import TASK_HELP, read_task

if TYPE_CHECKING:  # torch takes seconds to import: only the commands that need it pay
    from kiridashi_server.backbone import Backbone

_SHORT = 12


def _configure_bank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bank", type=Path, default=Path("bank"), metavar="DIR", help="the bank's folder")


def _configure_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("record", help="a task's name, or the beginning of a record's id")
    _configure_bank(parser)


def _configure_model(parser: argparse.ArgumentParser) -> None:
    _configure_bank(parser)
    parser.add_argument("--backbone", default="efficientnet-lite0", metavar="NAME", help="a known backbone")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="side of the input")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")


def _configure_learn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="TASK",
        help=TASK_HELP,
    )
    parser.add_argument("--iterations", type=int, default=40, metavar="N", help="score-learning steps per task")
    _configure_model(parser)


def _configure_similar(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help=TASK_HELP)
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="labelled samples to look at, per class")
    parser.add_argument("--measure", metavar="NAME", help="similarity measure to show (default: the chosen one)")
    _configure_model(parser)


def _learn(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.amp.learning import ScoreSettings
    from kiridashi_server.bank.learning import learn_record
    from kiridashi_server.narrator import Narrator

    settings = ScoreSettings(iterations=arguments.iterations)
    tasks = [
        read_task(name, arguments.image_size, arguments.seed) for name in arguments.task
    ]  # all are read before anything is learnt
    backbone = _load_backbone(arguments)
    narrator = Narrator()
    learnt = []
    with Bank.open(arguments.bank) as bank:
        known = {_recipe(record): record for record in bank.list(backbone_fingerprint=backbone.fingerprint)}
        for task in tasks:
            record = known.get((task.digest, arguments.seed, repr(sorted(dataclasses.asdict(settings).items()))))
            is_new = record is None
            if record is None:
                with narrator.bar(task.name) as advance:
                    record = learn_record(backbone, task, settings, arguments.seed, progress=advance)
                bank.add(record)
            learnt.append({**_summary(record), "new": is_new})
    lines = [f"{row['task']}: {'learnt' if row['new'] else 'known already'}, {_outcomes(row)}" for row in learnt]
    return Outcome({"bank": str(arguments.bank), "records": learnt}, "\n".join(lines))


def _list(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        rows = [_summary(record) for record in bank.list()]
    lines = [f"{row['id'][:_SHORT]}  {row['task']}: {row['samples']} samples, {_outcomes(row)}" for row in rows]
    return Outcome({"records": rows}, "\n".join(lines) or "the bank is empty; next: kiridashi bank learn --task TASK")


def _show(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        record = bank.get(arguments.record)
    data = {
        **_summary(record),
        "labels": list(record.labels),
        "layout_digest": record.layout_digest,
        "provenance": dataclasses.asdict(record.provenance),
        "groups": {name: len(values) for name, values in record.scores.items()},
    }
    lines = [f"{key}: {value}" for key, value in data.items() if key not in ("groups", "provenance")]
    lines += [f"{key}: {value}" for key, value in data["provenance"].items()]
    lines.append(f"scores: {sum(data['groups'].values())} units in {len(data['groups'])} groups")
    return Outcome(data, "\n".join(lines))


def _similar(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.similarity.comparison import compare
    from kiridashi_server.similarity.measure import find_measure

    if arguments.measure:
        find_measure(arguments.measure)  # a wrong name is refused before anything is loaded
    task = read_task(arguments.task, arguments.image_size, arguments.seed)
    samples = task.split("train").few_shot(arguments.per_class, arguments.seed)
    with Bank.open(arguments.bank, create=False) as bank:
        records, assessments = bank.list(), AssessmentStore(bank.folder).list()
    evidence = compare(_load_backbone(arguments), records, samples, assessments=assessments, measure=arguments.measure)
    lines = [f"{evidence.verdict}: {evidence.reason}"]
    lines += [f"  {i.task}: similarity {i.similarity:.3f}, weight {i.weight:.2f}; {i.reason}" for i in evidence.items]
    lines += [f"  {task_name}: not judged; {reason}" for _, task_name, reason in evidence.silent]
    lines += [f"  {task_name}: left out; {reason}" for task_name, reason in evidence.left_out]
    return Outcome(dataclasses.asdict(evidence), "\n".join(lines))


def _verify(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        found = bank.verify()
    lines = [f"records: {found.records}, stored arrays: {found.blobs}"]
    lines += [
        f"damaged: {fault.kind} of '{fault.task}' ({fault.record_id[:_SHORT]}): {fault.what}" for fault in found.faults
    ]
    if found.leftovers_removed:
        lines.append(f"{found.leftovers_removed} leftovers of interrupted writes were removed")
    lines.append(
        "next: kiridashi bank forget the damaged records, and learn their tasks again" if found.faults else "all intact"
    )
    return Outcome(dataclasses.asdict(found), "\n".join(lines), ExitCode.STATE if found.faults else ExitCode.OK)


def _forget(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        record_id = bank.remove(arguments.record)
        AssessmentStore(bank.folder).forget(record_id)
    return Outcome({"id": record_id}, f"forgot {record_id[:_SHORT]}; its arrays are deleted")


def _summary(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "task": record.task,
        "samples": record.samples,
        "outcomes": dict(record.outcomes),
        "seconds": record.provenance.seconds,
        "backbone_fingerprint": record.backbone_fingerprint,
        "policy": record.policy,
        "created": record.created,
    }


def _outcomes(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in row["outcomes"].items())


def _recipe(record: Record) -> tuple[str, int, str]:
    """What decides a record besides the backbone: a task learnt by the same recipe is not learnt again."""
    provenance = record.provenance
    return provenance.task_digest, provenance.seed, repr(sorted(provenance.settings.items()))


def _load_backbone(arguments: argparse.Namespace) -> Backbone:
    import torch

    from kiridashi_server.backbone import Backbone

    torch.set_num_threads(1)  # the same numbers on every machine, and no spinning on a busy one
    return Backbone.load(arguments.backbone, image_size=arguments.image_size)


COMMANDS = (
    Command(
        "bank learn", "learn scores of past tasks; tasks that are known already are skipped", _configure_learn, _learn
    ),
    Command("bank list", "show all records", _configure_bank, _list),
    Command("bank show", "show one record", _configure_key, _show),
    Command("bank similar", "compare a new task with every record", _configure_similar, _similar),
    Command("bank verify", "check every stored array against its digest", _configure_bank, _verify),
    Command("bank forget", "delete a record and its arrays", _configure_key, _forget),
)
