"""``kiridashi bank``: learn past tasks, look at what is known, compare a new task, check, forget."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter

from kiridashi.command import Command, Outcome
from kiridashi.errors import ExitCode

from kiridashi_server.bank.assessments import AssessmentStore
from kiridashi_server.bank.rows import RecordSummary
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli.bank_source import (
    SHORT,
    add_bank_argument,
    add_model_arguments,
    add_record_argument,
    load_backbone,
    others_text,
    row_data,
    row_text,
)
from kiridashi_server.cli.task_source import TASK_HELP, read_task


def _configure_samples(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
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
    _configure_samples(parser)


def _configure_list(parser: argparse.ArgumentParser) -> None:
    add_bank_argument(parser)
    parser.add_argument("--task", metavar="NAME", help="records of this task only")


def _configure_similar(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help=TASK_HELP)
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="labelled samples to look at, per class")
    parser.add_argument("--measure", metavar="NAME", help="similarity measure to show (default: the chosen one)")
    _configure_samples(parser)


def _learn(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.amp.learning import ScoreSettings
    from kiridashi_server.bank.learning import learn_record
    from kiridashi_server.narrator import Narrator

    settings = ScoreSettings(iterations=arguments.iterations)
    tasks = [
        read_task(name, arguments.image_size, arguments.seed) for name in arguments.task
    ]  # all are read before anything is learnt
    backbone = load_backbone(arguments)
    narrator = Narrator()
    learnt = []
    with Bank.open(arguments.bank) as bank:
        known = {_recipe(one): one for one in bank.summaries(backbone_fingerprint=backbone.fingerprint)}
        for task in tasks:
            found = known.get((task.digest, arguments.seed, repr(sorted(dataclasses.asdict(settings).items()))))
            if found is not None:
                learnt.append({**row_data(found), "new": False})
                continue
            with narrator.bar(task.name) as advance:
                record = learn_record(backbone, task, settings, arguments.seed, progress=advance)
            bank.add(record)
            learnt.append({**row_data(record), "new": True})
    lines = [f"{row['task']}: {'learnt' if row['new'] else 'known already'}, {row_text(row)}" for row in learnt]
    return Outcome({"bank": str(arguments.bank), "records": learnt}, "\n".join(lines))


def _list(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        rows = [row_data(record) for record in bank.summaries(task=arguments.task)]
    backbones = Counter(row["backbone_fingerprint"] for row in rows)
    lines = [f"{row['id'][:SHORT]}  {row['task']}: {row_text(row)}" for row in rows]
    if len(backbones) > 1:
        lines += [f"backbone {name[:SHORT]}: {count} records" for name, count in sorted(backbones.items())]
    empty = "no record; next: kiridashi bank learn --task TASK"
    return Outcome({"records": rows, "backbones": dict(backbones)}, "\n".join(lines) or empty)


def _show(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        record = bank.get(arguments.record)
    data = {
        **row_data(record),
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
        backbone = load_backbone(arguments)
        records, backbones = bank.list(backbone_fingerprint=backbone.fingerprint), bank.backbones()
        assessments = AssessmentStore(bank.folder).list()
    evidence = compare(backbone, records, samples, assessments=assessments, measure=arguments.measure)
    lines = [f"{evidence.verdict}: {evidence.reason}"]
    lines += [f"  {i.task}: similarity {i.similarity:.3f}, weight {i.weight:.2f}; {i.reason}" for i in evidence.items]
    lines += [f"  {task_name}: left out; {reason}" for task_name, reason in evidence.left_out]
    lines += [f"  {task_name}: not judged; {reason}" for _, task_name, reason in evidence.silent]
    lines += filter(None, [others_text(backbones, backbone.fingerprint)])
    others = sum(backbones.values()) - len(records)
    return Outcome({**dataclasses.asdict(evidence), "other_backbones": others}, "\n".join(lines))


def _verify(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        found = bank.verify()
    lines = [f"records: {found.records}, stored arrays: {found.blobs}"]
    lines += [
        f"damaged: {fault.kind} of '{fault.task}' ({fault.record_id[:SHORT]}): {fault.what}" for fault in found.faults
    ]
    if found.stacks_removed:
        lines.append(f"{found.stacks_removed} files of stacked scores did not fit the records and were removed")
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
    return Outcome({"id": record_id}, f"forgot {record_id[:SHORT]}; its arrays are deleted")


def _recipe(record: RecordSummary) -> tuple[str, int, str]:
    """What decides a record besides the backbone: a task learnt by the same recipe is not learnt again."""
    provenance = record.provenance
    return provenance.task_digest, provenance.seed, repr(sorted(provenance.settings.items()))


COMMANDS = (
    Command(
        "bank learn", "learn scores of past tasks; tasks that are known already are skipped", _configure_learn, _learn
    ),
    Command("bank list", "show all records", _configure_list, _list),
    Command("bank show", "show one record", add_record_argument, _show),
    Command("bank similar", "compare a new task with every record", _configure_similar, _similar),
    Command("bank verify", "check every stored array against its digest", add_bank_argument, _verify),
    Command("bank forget", "delete a record and its arrays", add_record_argument, _forget),
)
