"""Are the settings that a bank settles right, and what is lost where settings or records are wrong?

Tasks of the bank play new and settle how cuts are recovered, as ``kiridashi stock settle`` has it. Then the development
tasks, which had no part in that, are cut: with the settled settings, with the defaults, and with each setting twice and
half as large; with a fifth of the bank's records made bad in several ways; and with less and less of a past, down to
none. Held-out tasks are not touched.

Finished cells are kept where ``benchmarks.oneshot`` keeps its own, and so are bank and stock, which both share.
``--quick`` starts from the shipped bank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.cut_run import no_bar
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.iterations import RecoverSettings
from kiridashi_server.settle.choice import Choice
from kiridashi_server.settle.run import run_settling
from kiridashi_server.settle.store import Settled
from kiridashi_server.stages import Workspace
from numpy.typing import NDArray

from benchmarks.oneshot import FOLDER, PER_CLASS, QUICK_STOCK, STOCK, cells_of
from benchmarks.oneshot_bank import shipped_bank
from benchmarks.oneshot_chain import STOCK_VIEWS, Chain, chain_folder
from benchmarks.oneshot_figures import gain
from benchmarks.oneshot_tasks import load_task, task_names
from benchmarks.report import Figure, Options, Report, options_parser, rounded, show, table
from benchmarks.settings_lines import NewLine, shared_units, wrong
from benchmarks.settings_poison import MISSING, POISONS, poisoned

CODE = ("server_tools/kiridashi_server/settle", "benchmarks/settings_lines.py", "benchmarks/settings_poison.py")
PARTS = ("settle", "wrong", "poison", "fallback")
AT_ONCE = RecoverSettings(iterations=0)
"""Masks are compared without iterations."""

FloatArray = NDArray[np.float64]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print tables and figures, write the report."""
    chosen = _parser().parse_args(arguments)
    if chosen.quick:
        chosen.bank, chosen.tasks, chosen.seed, chosen.limits = 12, 3, 0, (30,)
    torch.set_num_threads(1)
    report = Report("settings", Options(chosen.json, chosen.quick, chosen.seed))
    run = _Run(chosen, report)
    for part in chosen.parts:
        getattr(run, part)()
    report.print_figures()
    report.write()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options_parser("settings", "what wrong settings and bad records cost")
    parser.add_argument("--bank", type=int, default=32, metavar="N", help="past tasks, at most 32 (default 32)")
    parser.add_argument("--tasks", type=int, default=6, metavar="N", help="development tasks, at most 6 (default 6)")
    parser.add_argument(
        "--limits", type=_numbers, default=(30, 15), metavar="N", help="per cent of the parameters (default 30,15)"
    )
    parser.add_argument(
        "--stock-iterations", type=int, default=0, metavar="N", help="of each piece (default: as the product)"
    )
    parser.add_argument("--parts", type=_parts, default=PARTS, metavar="NAMES", help=f"default {','.join(PARTS)}")
    return parser


class _Run:
    """The parts; each adds its rows and figures to the report."""

    def __init__(self, chosen: argparse.Namespace, report: Report) -> None:
        self._report = report
        self._limits: Sequence[int] = chosen.limits
        backbone = Backbone.load(image_size=64)
        stock = QUICK_STOCK if chosen.quick else STOCK
        if chosen.stock_iterations:
            stock = replace(stock, iterations=chosen.stock_iterations)
        past = task_names("bank")[: chosen.bank]
        folder = chain_folder(FOLDER, cells_of(past, stock).digest, past, chosen.seed)
        self._chain = Chain(backbone, past, stock, chosen.seed, folder, shipped_bank if chosen.quick else None)
        self._cells = cells_of(past, stock, CODE)
        self._new = task_names("development")[: chosen.tasks]
        self._found: Settled | None = None

    def settle(self) -> None:
        """What the bank's own tasks choose."""
        for where, choice in self._choices().items():
            print(f"{where}: {choice.reason}")
            for step in choice.steps:
                for number, row in enumerate(step.rows):
                    values = {"accuracy": row.accuracy, "behind": row.behind, "error": row.error}
                    head = {"part": "settle", "where": where, "setting": step.setting, "option": step.told(row)}
                    self._add({**head, **values, "chosen": number == step.chosen})
            self._report.figures[f"settled.{where}.iterations"] = Figure(choice.settings.iterations, "iterations")
        self._report.figures["settled.tasks"] = Figure(len(self._settled.played), "tasks")
        self._report.figures["seconds.settle"] = Figure(self._settled.seconds, "s")

    def wrong(self) -> None:
        """Settled settings beside the defaults, and beside each setting wrong by a factor of two."""
        for where, choice in self._choices().items():
            stock = where == "with_stock"
            right = self._accuracies(choice.settings, stock=stock)
            others = {"default": RecoverSettings()} | wrong(choice.settings, self._chain)
            lost = {}
            for name, settings in others.items():
                lost[name] = gain(self._accuracies(settings, stock=stock), right)
                self._add({"part": "wrong", "where": where, "setting": name, **_plain(lost[name])})
            default = lost.pop("default")
            self._report.figures[f"points.{where}.default"] = default
            self._report.figures[f"worst_points_at_2x.{where}"] = min(lost.values(), key=lambda figure: figure.value)
            print(f"\n{where}, points against the settled settings (accuracy {right.mean():.1%})")
            print(_figures({"default": default, **lost}))

    def poison(self) -> None:
        """A fifth of the records bad: the composed mask by itself, and the plans of the stock."""
        records, found = self._chain.records, {}
        clean = self._accuracies(AT_ONCE, stock=False)
        for kind in (MISSING, *POISONS):
            bad = poisoned(records, kind, self._chain.seed)
            found[f"poison.{kind}.mask"] = gain(self._accuracies(AT_ONCE, stock=False, past=kind, records=bad), clean)
            found[f"poison.{kind}.shared_units"] = Figure(shared_units(self._chain, bad), "share")
        for name, figure in found.items():
            self._add({"part": "poison", "what": name, **_plain(figure)})
        self._report.figures |= {"poison.nothing.mask": Figure(float(clean.mean()), "share"), **found}

    def fallback(self) -> None:
        """From a bank with a stock down to nothing, and how far each rung is above Taylor pruning, which needs no past.

        Without a stock the settings are those settled for that; without a bank nobody settled any.
        """
        records, choices = self._chain.records, self._choices()
        own, default = choices["without_stock"].settings, RecoverSettings()
        rungs = {
            "stock": self._accuracies(choices["with_stock"].settings, stock=True),
            "bank": self._accuracies(own, stock=False),
            "one_record": self._accuracies(default, stock=False, past="one", records=records[:1]),
            "nothing": self._accuracies(default, stock=False, past="none", records=()),
        }
        taylor = self._accuracies(default, stock=False, past="taylor")
        for name, accuracies in rungs.items():
            self._report.figures[f"fallback.{name}"] = Figure(float(accuracies.mean()), "share")
            self._report.figures[f"fallback_gap.{name}"] = figure = gain(accuracies, taylor)
            self._add({"part": "fallback", "rung": name, "accuracy": float(accuracies.mean()), **_plain(figure)})

    def _choices(self) -> Mapping[str, Choice]:
        return {"with_stock": self._settled.with_stock, "without_stock": self._settled.without_stock}

    @property
    def _settled(self) -> Settled:
        if self._found is None:
            chain = self._chain
            tasks = [load_task(name, seed=chain.seed, views=STOCK_VIEWS) for name in chain.names]
            workspace = Workspace(chain.folder / "settle", lambda name, reused: _say(name))
            with workspace.locked():
                self._found = run_settling(
                    workspace, chain.backbone, tasks, chain.records, chain.settings, chain.seed, no_bar
                )
        return self._found

    def _accuracies(
        self, settings: RecoverSettings, *, stock: bool, past: str = "", records: Sequence[Any] | None = None
    ) -> FloatArray:
        """Of the development tasks, the mean over sizes, float64 [tasks]; ``past`` names other records."""
        return np.array(
            [
                np.mean([self._accuracy(name, limit, settings, stock, past, records) for limit in self._limits])
                for name in self._new
            ]
        )

    def _accuracy(
        self, name: str, limit: int, settings: RecoverSettings, stock: bool, past: str, records: Sequence[Any] | None
    ) -> float:
        line = NewLine(self._chain, name, limit, PER_CLASS)
        key = f"settings-{self._chain.seed}-{name}-{limit}-{past}"

        def planned() -> dict[str, Any]:
            known = self._chain.records if records is None else records
            return {"plan": (line.taylor() if past == "taylor" else line.composed(known)).to_json()}

        def measured() -> dict[str, Any]:
            plan = Plan.from_json(self._cells.get(f"{key}-plan", planned)[0]["plan"])
            return {"accuracy": line.accuracy(plan, settings, stock=stock)}

        how = "-".join(map(str, astuple(settings)))
        found, reused = self._cells.get(f"{key}-{'stock' if stock else 'backbone'}-{how}", measured)
        if not reused:
            _say(f"{key} {'stock' if stock else 'backbone'} {how}: {found['accuracy']:.1%}")
        accuracy: float = found["accuracy"]
        return accuracy

    def _add(self, row: dict[str, Any]) -> None:
        self._report.rows.append(rounded(row))


def _plain(figure: Figure) -> dict[str, Any]:
    low, high = figure.ci95 or (None, None)
    return {"value": figure.value, "unit": figure.unit, "low": low, "high": high}


def _figures(figures: Mapping[str, Figure]) -> str:
    rows = []
    for name, figure in figures.items():
        low, high = figure.ci95 or (np.nan, np.nan)
        rows.append((name, show(figure.value, "+.1f"), f"[{low:+.1f}, {high:+.1f}]"))
    return table(("setting", "points", "95 %"), rows)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return names


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
