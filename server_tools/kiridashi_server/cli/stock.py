"""``kiridashi stock``: cuts of the backbone, recovered once on past tasks, that new lines are cut from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError

from kiridashi_server.cli.bank_source import add_model_arguments, load_backbone
from kiridashi_server.cli.task_source import TASK_HELP, read_task

if TYPE_CHECKING:
    from kiridashi_server.settle.store import Settled

STOCK_FOLDER = "stock"
"""Where a bank's stocks are, in the bank's folder, one for each backbone and image size."""


def _configure_place(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--stock", type=Path, metavar="DIR", help="the stock's folder (default: BANK/stock/BACKBONE-PIXELS)"
    )


def _configure_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", action="append", required=True, metavar="TASK", help=f"a past task: {TASK_HELP}")
    _configure_place(parser)
    parser.add_argument(
        "--shares", metavar="SHARES", help="parameters that pieces keep, falling from 1 (default 1,0.6,0.35,0.2)"
    )
    parser.add_argument("--iterations", type=int, metavar="N", help="joint training of each piece (default 300)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")


def _configure_settle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", action="append", required=True, metavar="TASK", help=f"each task that the stock has: {TASK_HELP}"
    )
    _configure_place(parser)


def folder_of(arguments: argparse.Namespace) -> Path:
    """Where the stock is."""
    stock: Path | None = arguments.stock
    bank: Path = arguments.bank
    return stock or bank / STOCK_FOLDER / f"{arguments.backbone}-{arguments.image_size}"


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    chosen: dict[str, object] = {}
    if arguments.iterations is not None:
        chosen["iterations"] = arguments.iterations
    if arguments.shares:
        try:
            chosen["shares"] = tuple(float(share) for share in arguments.shares.split(","))
        except ValueError as error:
            raise InputError(
                f"--shares takes numbers with commas between, got {arguments.shares!r}",
                next_step="such as --shares 1,0.5,0.25",
            ) from error
    return chosen


def _make(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.bank.store import Bank
    from kiridashi_server.narrator import Narrator
    from kiridashi_server.stages import Workspace
    from kiridashi_server.stock.pieces import StockSettings
    from kiridashi_server.stock.run import run_stock
    from kiridashi_server.stock.store import Making, save_stock

    settings = StockSettings(**_settings(arguments))  # type: ignore[arg-type]
    tasks = [read_task(name, arguments.image_size, arguments.seed) for name in arguments.task]
    backbone = load_backbone(arguments)
    with Bank.open(arguments.bank, create=False) as bank:
        records = bank.list(backbone_fingerprint=backbone.fingerprint)
    narrator = Narrator(("stock",))
    folder = folder_of(arguments)
    workspace = Workspace(folder, narrator.stage)
    with workspace.locked():
        stock = run_stock(workspace, backbone, tasks, records, settings, arguments.seed, narrator.bar)
        making = Making(
            tasks={task.name: task.digest for task in tasks},
            records=tuple(record.id for record in records),
            settings=settings,
            seed=arguments.seed,
            seconds=sum(stage.seconds for stage in workspace.times),
        )
        save_stock(folder, stock, backbone, making)
    return _show(arguments)


def _show(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.settle.store import read_settled
    from kiridashi_server.stock.store import read_manifest

    folder = folder_of(arguments)
    manifest, settled = read_manifest(folder), read_settled(folder)
    making = manifest.making
    known = settled.with_stock.reason if settled and settled.is_for(making) else "not settled (kiridashi stock settle)"
    lines = [
        f"{len(manifest.pieces)} pieces from {len(making.tasks)} tasks and {len(making.records)} records, "
        f"made in {making.seconds:.0f} s",
        *(f"  {piece.name}: {piece.parameters:,} parameters" for piece in manifest.pieces),
        f"how cuts out of it are recovered: {known}",
        "it holds what these tasks taught: keep it where their records may be",
    ]
    return Outcome({"stock": str(folder), **msgspec.to_builtins(manifest)}, "\n".join(lines))


def _settle(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.bank.store import Bank
    from kiridashi_server.narrator import Narrator
    from kiridashi_server.settle.run import CELL, run_settling
    from kiridashi_server.settle.store import save_settled
    from kiridashi_server.stages import Workspace
    from kiridashi_server.stock.store import read_manifest

    folder = folder_of(arguments)
    making = read_manifest(folder).making
    tasks = [read_task(name, arguments.image_size, making.seed) for name in arguments.task]
    _check_tasks(making.tasks, {task.name: task.digest for task in tasks})
    backbone = load_backbone(arguments)
    with Bank.open(arguments.bank, create=False) as bank:
        records = bank.list(backbone_fingerprint=backbone.fingerprint)
    narrator = Narrator(("stock", "settle"))

    def announce(name: str, reused: bool) -> None:
        if not name.startswith(CELL):
            narrator.stage(name, reused)

    workspace = Workspace(folder / "settle", announce)
    with workspace.locked():
        settled = run_settling(workspace, backbone, tasks, records, making.settings, making.seed, narrator.bar)
    path = save_settled(folder, settled)
    return Outcome({"file": str(path), **msgspec.to_builtins(settled)}, "\n".join(_told(settled)))


def _check_tasks(made_from: Mapping[str, str], given: Mapping[str, str]) -> None:
    if given == made_from:
        return
    wrong = sorted(name for name in {*made_from, *given} if made_from.get(name) != given.get(name))
    raise InputError(
        f"the stock was made from other tasks: '{wrong[0]}' is missing, new or changed",
        why=f"it was made from {', '.join(sorted(made_from))}",
        next_step="name just these with --task, or make the stock again: kiridashi stock make",
    )


def _told(settled: Settled) -> Iterator[str]:
    for where, choice in (("the stock", settled.with_stock), ("the backbone", settled.without_stock)):
        yield f"cut out of {where}: {choice.reason}"
        for step in choice.steps:
            for number, row in enumerate(step.rows):
                mark = " *" if number == step.chosen else ""
                yield (
                    f"  {step.told(row):<34} {row.accuracy:.1%}, {100 * row.behind:.1f} +- {100 * row.error:.1f} "
                    f"points behind the best{mark}"
                )


COMMANDS = (
    Command("stock make", "prune the backbone step by step on past tasks, once for all lines", _configure_make, _make),
    Command("stock settle", "settle how cuts are recovered, by past tasks that play new", _configure_settle, _settle),
    Command("stock show", "show the pieces and what they were made from", _configure_place, _show),
)
