"""``kiridashi bank assess``: let the bank's tasks play new, so that measures and verdicts rest on measurements."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kiridashi.command import Command, Outcome

from kiridashi_server.bank.assessments import AssessmentStore
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli.bank_source import add_model_arguments, load_backbone
from kiridashi_server.cli.task_source import TASK_HELP, read_task

if TYPE_CHECKING:
    from kiridashi_server.similarity.assessment import Assessment
    from kiridashi_server.similarity.choice import Choice


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", action="append", default=[], metavar="TASK", help=f"{TASK_HELP}; may be repeated")
    parser.add_argument("--per-class", type=int, default=6, metavar="N", help="labelled samples a task uses, per class")
    parser.add_argument("--iterations", type=int, default=40, metavar="N", help="steps of learning a task's own scores")
    parser.add_argument("--keep", type=float, default=0.3, metavar="SHARE", help="of the parameters, in every cut")
    add_model_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")


def _run(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.similarity.assessment import AssessSettings, usable_assessments

    settings = AssessSettings(
        share=arguments.keep, per_class=arguments.per_class, iterations=arguments.iterations, seed=arguments.seed
    )
    tasks = [read_task(name, arguments.image_size, arguments.seed) for name in arguments.task]
    with Bank.open(arguments.bank, create=False) as bank:
        backbone = load_backbone(arguments)
        records, store = bank.list(backbone_fingerprint=backbone.fingerprint), AssessmentStore(bank.folder)

    from kiridashi_server.narrator import Narrator
    from kiridashi_server.similarity.assess import assess, blank

    narrator = Narrator()
    for task in tasks:
        known = store.like(blank(backbone, task, settings))
        with narrator.bar(task.name) as advance:
            assess(backbone, task, records, settings, known=known, keep=store.put, progress=advance)
    return _outcome(usable_assessments(store.list(), backbone.fingerprint, backbone.layout.digest))


def _outcome(assessed: Sequence[Assessment]) -> Outcome:
    from kiridashi_server.similarity.assessment import gains, statistics_of
    from kiridashi_server.similarity.choice import choose_measure
    from kiridashi_server.similarity.conformal import VerdictSettings, coverage, tasks_needed

    choice, settings = choose_measure(assessed), VerdictSettings()
    needed = tasks_needed(settings.alpha)
    tried = coverage(gains(assessed), statistics_of(assessed), settings) if len(assessed) > needed else None
    data: dict[str, Any] = {
        "tasks": [_row(assessment) for assessment in assessed],
        "choice": dataclasses.asdict(choice),
        "tasks_needed": needed,
        "coverage": dataclasses.asdict(tried) if tried else None,
    }
    lines = [f"{row['task']}: bank {row['bank']:.1%}, own scores {row['own']:.1%}" for row in data["tasks"]]
    lines += _table(choice)
    lines.append(choice.reason)
    if tried:
        lines.append(
            f"bounds held for {tried.lower:.1%} (lower) and {tried.upper:.1%} (upper) of held-out tasks, "
            f"{tried.splits} splits with {tried.calibration} tasks to calibrate; "
            f"reuse for {tried.verdicts['reuse']:.1%}, of which {tried.kept:.1%} kept the margin"
        )
    else:
        lines.append(
            f"{len(assessed)} tasks are assessed; below {needed} nothing of this is used (all records weigh the same, "
            "the verdict is uncalibrated), and coverage needs one more"
        )
    return Outcome(data, "\n".join(lines))


def _row(assessment: Assessment) -> dict[str, Any]:
    return {
        "task": assessment.task,
        "bank": assessment.composed["uniform"],
        "own": assessment.own,
        "utilities": assessment.utilities,
        "similarities": assessment.similarities,
        "composed": assessment.composed,
        "statistics": assessment.statistics,
    }


def _table(choice: Choice) -> list[str]:
    head = "measure       rank correlation   gain (points)   regret (points), each with its standard error"
    rows = [
        f"{row.measure:<12} {row.spearman:+8.2f} +- {row.spearman_error:.2f} "
        f"{100 * row.gain:+9.1f} +- {100 * row.gain_error:.1f} {100 * row.regret:9.1f} +- {100 * row.regret_error:.1f}"
        for row in choice.rows
    ]
    return [head, *rows] if rows else []


COMMANDS = (Command("bank assess", "let tasks of the bank play new: measure what reuse gains them", _configure, _run),)
