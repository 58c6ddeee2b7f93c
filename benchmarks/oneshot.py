"""Does reuse win? A new line's model by one cut out of the stock, beside other ways to the same size.

Past tasks fill a bank and a stock. For every held-out task, whose classes nobody has seen, each method makes a model
of the same share of parameters from the same few samples, with the same number of iterations at the end; all are judged
on a drawing style that no server saw. Two tables: *masks*, where all cut the same backbone and get the same repair, and
the *whole product* beside whole alternatives.

Finished cells, banks and stocks are kept under ``benchmark-results/oneshot`` for this code, data and machine, and are
used again; how many were is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.stock.pieces import StockSettings

from benchmarks.cells import Cells
from benchmarks.oneshot_chain import Chain, chain_folder
from benchmarks.oneshot_figures import Comparison, Table, tabulate
from benchmarks.oneshot_methods import ITERATIVE, METHODS, STOCKS, Contest, Line
from benchmarks.oneshot_tasks import DATA, PACK, kinship, load_task, task_names
from benchmarks.report import Figure, Options, Report, options_parser, rounded, show, table

FOLDER = Path("benchmark-results/oneshot")
CODE = (
    *(f"server_tools/kiridashi_server/{name}" for name in ("amp", "bank", "budget", "compose", "graph", "recover")),
    *(f"server_tools/kiridashi_server/{name}" for name in ("similarity", "stock", "tasks")),
    *(f"server_tools/kiridashi_server/{name}.py" for name in ("backbone", "baselines", "pipeline")),
    *(f"benchmarks/{name}.py" for name in ("global_pruning", "oneshot_chain", "oneshot_methods", "oneshot_tasks")),
)
PER_CLASS = 6
MASKS = tuple(method for method in METHODS if method not in (*STOCKS, *ITERATIVE, "composed"))
WHOLE = tuple(method for method in METHODS if method not in ("product", "composed"))
STOCK = StockSettings()
QUICK_STOCK = StockSettings(shares=(1.0, 0.35), iterations=30)


def main(arguments: list[str] | None = None) -> int:
    """Run the cells, print both tables and the figures, write the report."""
    parser = options_parser("oneshot", "accuracy of one cut out of the stock, beside other ways to the same size")
    parser.add_argument("--bank", type=int, default=32, metavar="N", help="past tasks, at most 32 (default 32)")
    parser.add_argument("--tasks", type=int, default=44, metavar="N", help="held-out tasks, at most 44 (default 44)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="chains, from --seed on (default 3)")
    parser.add_argument("--kept", type=_numbers, default=(50, 30, 15), metavar="PERCENT", help="default 50,30,15")
    parser.add_argument("--iterations", type=_numbers, default=(0, 20, 50), metavar="N", help="default 0,20,50")
    parser.add_argument("--methods", type=_names, default=METHODS, metavar="NAMES", help=f"default {','.join(METHODS)}")
    parser.add_argument("--development", action="store_true", help="the tasks for choosing settings, not the held-out")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.bank, chosen.tasks, chosen.seeds, chosen.kept, chosen.iterations = 6, 4, 1, (30,), (20,)
        chosen.methods = ("product", "composed", "uniform_bank", "taylor", "l1", "task_specific")
    torch.set_num_threads(1)
    report = Report("oneshot", Options(chosen.json, chosen.quick, chosen.seed))
    run = _Run(chosen)
    report.rows = run.rows()
    steps = max(chosen.iterations)
    found = tabulate(report.rows)
    comparisons = {
        "gain_scorer": ("masks at equal start", Comparison(("composed", steps), MASKS, steps)),
        "gain": ("whole product", Comparison(("product", steps), WHOLE, steps)),
        "gain_at_once": ("whole product without any iteration", Comparison(("product", 0), WHOLE, steps)),
    }
    for prefix, (title, comparison) in comparisons.items():
        gains = comparison.gains(found)
        report.figures |= {f"{prefix}.{name}": figure for name, figure in gains.items()}
        if gains:
            print(f"\n{title}, rivals after {steps} iterations: points over, 95 % interval over tasks, Holm-adjusted p")
            print(_comparison(gains, comparison.p_values(found)))
    report.figures |= {**_times(report.rows, found), **run.costs}
    print(_accuracies(found))
    report.print_figures()
    report.write()
    return 0


class _Run:
    """All cells that were asked for, made or found."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._backbone = Backbone.load(image_size=64)
        self._settings = QUICK_STOCK if chosen.quick else STOCK
        self._past = task_names("bank")[: chosen.bank]
        self._new = task_names("development" if chosen.development else "held-out")[: chosen.tasks]
        data = hashlib.sha256((DATA / PACK).read_bytes()).hexdigest()
        settings = {"data": data, "stock": asdict(self._settings), "past": self._past, "per_class": PER_CLASS}
        self._cells = Cells.of(FOLDER / "cells", CODE, **settings)
        self._reused = 0
        self.costs: dict[str, Figure] = {}

    def rows(self) -> list[dict[str, Any]]:
        chosen, rows = self._chosen, []
        for seed in range(chosen.seed, chosen.seed + chosen.seeds):
            folder = chain_folder(FOLDER, self._cells.digest, self._past, seed)
            chain = Chain(self._backbone, self._past, self._settings, seed, folder)
            for kept in chosen.kept:
                for name in self._new:
                    found = [self._row(chain, name, kept, method, its) for method, its in self._jobs()]
                    rows += found
                    told = ", ".join(f"{row['method']} {row['accuracy']:.1%}" for row in found)
                    print(f"seed {seed}, {kept} %, {name}: {told}", file=sys.stderr, flush=True)
            self.costs |= {f"seconds.{name}": Figure(value, "s") for name, value in chain.seconds.items()}
        print(f"{self._reused} of {len(rows)} cells come from earlier runs of the same code, data and machine")
        return rows

    def _jobs(self) -> list[tuple[str, int]]:
        return [(method, its) for its in self._chosen.iterations for method in self._chosen.methods]

    def _row(self, chain: Chain, name: str, kept: int, method: str, iterations: int) -> dict[str, Any]:
        def made() -> dict[str, Any]:
            task = load_task(name, seed=chain.seed)
            samples = task.split("train").few_shot(PER_CLASS, chain.seed)
            line = Line(samples, task.split("test"), len(task.labels), kept / 100, chain.seed)
            return Contest(chain, line).run(method, iterations)

        result, reused = self._cells.get(f"{chain.seed}-{name}-{kept}-{method}-{iterations}", made)
        self._reused += reused
        head = {"seed": chain.seed, "task": name, "kin": kinship(name), "kept": kept, "method": method}
        return rounded({**head, "iterations": iterations, **result, "reused": reused})


def _times(rows: Sequence[dict[str, Any]], found: Table) -> dict[str, Figure]:
    """Seconds of each method, and the product's least time to the accuracy of task-specific pruning over the latter's.

    Of both the cheapest number of iterations counts: of task-specific pruning the one with its best mean accuracy, of
    the product the first that is as good; None if none is.
    """
    seconds = tabulate(rows, "seconds")
    figures = {
        f"seconds.{method}@{kept}.{its}": Figure(float(values.mean()), "s")
        for (method, kept, its), values in seconds.items()
    }
    for kept in sorted({kept for _, kept, _ in found}):
        rivals = [key for key in sorted(found, key=lambda key: key[2]) if key[:2] == ("task_specific", kept)]
        ours = [key for key in sorted(found, key=lambda key: key[2]) if key[:2] == ("product", kept)]
        if not rivals or not ours:
            continue
        best = max(rivals, key=lambda key: float(found[key].mean()))
        equal = next((key for key in ours if found[key].mean() >= found[best].mean()), None)
        ratio = float(seconds[equal].mean() / seconds[best].mean()) if equal else None
        figures[f"time_ratio.task_specific@{kept}"] = Figure(ratio, "ratio")
    return figures


def _comparison(figures: dict[str, Figure], p_values: dict[str, float]) -> str:
    rows = []
    for rival, figure in figures.items():
        low, high = figure.ci95 or (np.nan, np.nan)
        rows.append((rival, show(figure.value, "+.1f"), f"[{low:+.1f}, {high:+.1f}]", show(p_values[rival], ".2g")))
    return table(("over", "points", "95 %", "p"), rows)


def _accuracies(found: Table) -> str:
    rows = [
        (method, str(kept), str(its), show(100 * float(values.mean()), ".1f"), str(len(values)))
        for (method, kept, its), values in sorted(found.items(), key=lambda item: (-item[0][1], item[0][2], item[0][0]))
    ]
    return table(("method", "kept %", "iterations", "accuracy %", "tasks"), rows)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"there is no method {unknown[0]!r}; known: {', '.join(METHODS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
