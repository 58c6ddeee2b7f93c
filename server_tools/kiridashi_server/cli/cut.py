"""``kiridashi cut``: from a new task and a bank to a bundle inside a budget."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from kiridashi.budget import MIB, Budget
from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError
from kiridashi.messages import check_name
from kiridashi.runtime import RUNTIMES

from kiridashi_server.cli.bank_source import others_text
from kiridashi_server.cli.judge_source import judged_by
from kiridashi_server.cli.plant_state import add_state_argument
from kiridashi_server.cli.profile_source import PROFILE_HELP, read_profile
from kiridashi_server.cli.stock import folder_of
from kiridashi_server.cli.task_source import TASK_HELP, few_samples, read_task

if TYPE_CHECKING:
    from kiridashi_server.backbone import Backbone
    from kiridashi_server.bank.record import Record
    from kiridashi_server.compose.stack import ScoreStack
    from kiridashi_server.cut_run import CutRun, Planned
    from kiridashi_server.settle.store import Recovery
    from kiridashi_server.similarity.assessment import Assessment
    from kiridashi_server.stock.pieces import Stock


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help=TASK_HELP)
    parser.add_argument("--line", required=True, metavar="NAME", help="the line that the bundle is for")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="work folder; the bundle is stages/export/bundle in it",
    )
    parser.add_argument(
        "--bank", type=Path, default=Path("bank"), metavar="DIR", help="the score bank (default: ./bank)"
    )
    parser.add_argument(
        "--stock",
        type=Path,
        metavar="DIR",
        help="cut out of these pieces (default: BANK/stock/BACKBONE-PIXELS, where there is one)",
    )
    parser.add_argument("--no-stock", action="store_true", help="cut out of the backbone as it is")
    parser.add_argument(
        "--no-bank", action="store_true", help="there are no past tasks: the task's own few samples decide"
    )
    parser.add_argument("--backbone", default="efficientnet-lite0", metavar="NAME", help="the backbone to cut")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="side of the input (default 64)")
    parser.add_argument("--budget", default="", metavar="LIMITS", help="such as memory=96MiB,file=5MiB,latency=2ms")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--profile", type=Path, metavar="FILE", help=f"{PROFILE_HELP} (default: measure this machine)")
    whose.add_argument("--device", metavar="NAME", help="a device of the fleet: its profile, and it measures the cut")
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), help="with --device: which of its profiles")
    parser.add_argument("--threads", type=int, metavar="N", help="with --device: of its profile (default: the fewest)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="with --device: how long to wait for one measurement (default 600)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="with --device: what it may take for one measurement (default 30)",
    )
    add_state_argument(parser)
    parser.add_argument("--release", type=int, default=1, metavar="N", help="version number of the bundle (default 1)")
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="weight updates after the cut (default: as 'kiridashi stock settle' found, else 20)",
    )
    parser.add_argument("--per-class", type=int, default=0, metavar="N", help="use this many samples per class only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")


def _run(arguments: argparse.Namespace) -> Outcome:
    budget = Budget.parse(arguments.budget) if arguments.budget else None
    check_name(arguments.line, "line")
    if arguments.release < 1:
        raise InputError(f"a release number is at least 1, got {arguments.release}")
    if not min(arguments.timeout, arguments.seconds) > 0:
        raise InputError("--timeout and --seconds must be above zero")
    if arguments.stock and arguments.no_stock:
        raise InputError("--stock and --no-stock exclude each other", next_step="leave one of them away")
    profile = read_profile(arguments.profile) if arguments.profile else None
    import torch  # takes seconds: bad arguments are refused first

    from kiridashi_server.backbone import Backbone
    from kiridashi_server.cut_run import CutRequest, CutRun
    from kiridashi_server.narrator import Narrator
    from kiridashi_server.pipeline import Release
    from kiridashi_server.stages import Workspace

    torch.set_num_threads(1)  # the same numbers on every machine, and no spinning on a busy one
    task = read_task(arguments.task, arguments.image_size, arguments.seed)
    narrator = Narrator(("evidence", "profile", "plan", "cut", "export"))
    backbone = Backbone.load(arguments.backbone, image_size=arguments.image_size)
    past, (stock, recovery) = _past(arguments, backbone), _stock_and_recovery(arguments, backbone)
    narrator.fact(recovery.reason)
    workspace = Workspace(arguments.output, narrator.stage)
    with judged_by(arguments, backbone, narrator.fact) as judge, workspace.locked():
        request = CutRequest(
            backbone=backbone,
            records=past.records,
            assessments=past.assessments,
            samples=few_samples(task, arguments.per_class, arguments.seed),
            calibration=task.split("val" if "val" in task.splits else "train"),
            release=Release(arguments.line, arguments.release, task.name, task.labels),
            budget=budget,
            profile=judge.profile if judge else profile,
            device=arguments.device or "",
            measure=judge.measure if judge else None,
            recover=recovery.settings,
            recovery=recovery.reason,
            stock=stock,
            seed=arguments.seed,
            stack=past.stack,
        )
        return _outcome(CutRun(request, workspace, narrator.bar), past.backbones)


@dataclass(frozen=True)
class _Past:
    """What is known of past tasks; nothing, without a bank."""

    records: Sequence[Record] = ()
    assessments: Sequence[Assessment] = ()
    stack: ScoreStack | None = None
    backbones: Mapping[str, int] = field(default_factory=dict)


def _past(arguments: argparse.Namespace, backbone: Backbone) -> _Past:
    from kiridashi_server.bank.assessments import AssessmentStore
    from kiridashi_server.bank.store import Bank

    if arguments.no_bank:
        return _Past()
    with Bank.open(arguments.bank, create=False) as bank:
        return _Past(
            bank.list(backbone_fingerprint=backbone.fingerprint),
            AssessmentStore(bank.folder).list(),
            bank.stack(backbone.fingerprint, backbone.layout.digest),
            bank.backbones(),
        )


def _stock_and_recovery(arguments: argparse.Namespace, backbone: Backbone) -> tuple[Stock | None, Recovery]:
    """The stock that is named, or the bank's if it has one, and how a cut out of it is recovered."""
    from kiridashi_server.settle.store import read_settled, recovery_for
    from kiridashi_server.stock.store import load_stock, read_manifest

    folder = folder_of(arguments)
    there = bool(arguments.stock) or (folder.exists() and not arguments.no_bank)
    stock = load_stock(folder, backbone) if there and not arguments.no_stock else None
    settled = read_settled(folder) if there else None
    recovery = recovery_for(settled, backbone, read_manifest(folder).making if stock else None)
    return stock, recovery if arguments.iterations is None else recovery.but(arguments.iterations)


def _outcome(run: CutRun, backbones: Mapping[str, int]) -> Outcome:
    exported, planned = run.exported, run.planned
    parameters_dense = run.request.backbone.costs.parameters({})
    data = {
        "bundle": str(run.bundle),
        "device": run.request.device or None,
        "stock_piece": run.cut.piece,
        "budget": msgspec.to_builtins(run.budget),
        "forecast": msgspec.to_builtins(planned.forecast),
        "measured": msgspec.to_builtins(planned.measured),
        "corrections": planned.corrections,
        "binding": planned.binding,
        "importance": planned.importance,
        "gap": planned.gap,
        "parameters": planned.parameters,
        "parameters_dense": parameters_dense,
        "explanation": run.composed.explanation,
        "recovery": {"settings": dataclasses.asdict(run.request.recover), "reason": run.request.recovery},
        "other_backbones": sum(backbones.values()) - len(run.request.records),
        "files": msgspec.to_builtins(exported.files),
        "dropped": list(exported.dropped),
    }
    best = planned.importance * (1 + planned.gap)
    lines = [
        f"{planned.parameters:,} of {parameters_dense:,} parameters stay; binding limit: {planned.binding}",
        f"{planned.importance:.2%} of the importance stays, {best:.2%} at most could",
        f"{_needs(planned, run.request.device)}; budget {run.budget}",
        run.composed.explanation,
        _origin(run),
        run.request.recovery,
        *filter(None, [others_text(backbones, run.request.backbone.fingerprint)]),
        f"next: kiridashi publish {run.bundle} --line {run.request.release.line}",
    ]
    return Outcome(data, "\n".join(lines))


def _origin(run: CutRun) -> str:
    if run.request.stock is None or run.cut.piece is None:
        return "cut out of the backbone as it is; a stock makes better small models: kiridashi stock make"
    size = run.request.backbone.costs.parameters(run.request.stock.pieces[run.cut.piece].plan.counts)
    return f"cut out of piece {run.cut.piece + 1} of the stock, {size:,} parameters"


def _needs(planned: Planned, device: str) -> str:
    needs = planned.measured or planned.forecast
    memory, file = needs.memory_bytes / MIB, needs.file_bytes / MIB
    text = f"{memory:.1f} MiB, {file:.2f} MiB file, p95 {needs.latency_p95_ms:.3g} ms"
    if planned.measured is None:
        return f"forecast: {text} (the device measures it before it goes live)"
    return f"measured{' on ' if device else ''}{device}: {text}"


COMMANDS = (Command("cut", "cut the backbone once for a new task, inside a budget", _configure, _run),)
