"""Does reuse win? A new line's model by one cut out of the stock, beside other ways to a small model.

Past tasks fill a bank and a stock. For every held-out task, whose classes nobody has seen, each method makes a model
inside the same limit from the same few samples, with the same number of iterations at the end; all are judged on a
drawing style that no server saw. Limits are shares of the parameters, and the latency and memory that this machine's
profile expects of a cut at 30 %. Two tables: *masks*, where all cut the same backbone and get the same repair, and the
*whole product* beside whole alternatives. Then the same product with smaller banks.

``--quick`` starts from a shipped bank and makes a smaller stock. Finished cells, banks and stocks are kept under
``benchmark-results/oneshot`` for this code, data and machine, and are used again; how many were is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.stock.pieces import StockSettings

from benchmarks.cells import Cells
from benchmarks.oneshot_bank import shipped_bank
from benchmarks.oneshot_chain import Chain, chain_folder
from benchmarks.oneshot_figures import Comparison, Key, Table, gain, over_seeds, tabulate
from benchmarks.oneshot_limits import DeviceLimit, Limit, ShareLimit
from benchmarks.oneshot_methods import ITERATIVE, METHODS, STOCKS, Contest, Line
from benchmarks.oneshot_profile import REFERENCE_PERCENT, RESOURCES, device_profile, measured_ratios
from benchmarks.oneshot_rivals import RIVALS, Rival
from benchmarks.oneshot_tasks import DATA, PACK, kinship, load_task, task_names
from benchmarks.report import Figure, Options, Report, options_parser, rounded, show, table

FOLDER = Path("benchmark-results/oneshot")
CODE = (
    *(f"server_tools/kiridashi_server/{name}" for name in ("amp", "bank", "budget", "compose", "graph", "recover")),
    *(f"server_tools/kiridashi_server/{name}" for name in ("similarity", "stock", "tasks")),
    *(f"server_tools/kiridashi_server/{name}.py" for name in ("backbone", "baselines", "pipeline")),
    *(f"benchmarks/{name}.py" for name in ("global_pruning", "oneshot_chain", "oneshot_limits", "oneshot_methods")),
    "benchmarks/oneshot_tasks.py",
)
RIVAL_CODE = ("server_tools/kiridashi_server/export", "benchmarks/oneshot_rivals.py")
PER_CLASS = 6
MASKS = tuple(method for method in METHODS if method not in (*STOCKS, *ITERATIVE, "composed"))
WHOLE = tuple(method for method in (*METHODS, *RIVALS) if method not in ("product", "composed"))
STOCK = StockSettings()
QUICK_STOCK = StockSettings(shares=(1.0, 0.35), iterations=200)
QUICK_METHODS = ("product", "uniform_bank", "taylor", "l1", "task_specific")
AT_ONCE = ("product", "nested_l1")
"""What is tried without iterations: the others start from weights that no past task has touched."""
GROWTH_LIMIT = "30"


def main(arguments: list[str] | None = None) -> int:
    """Run the cells, print the tables and the figures, write the report."""
    chosen = _parser().parse_args(arguments)
    if chosen.quick:
        chosen.bank, chosen.tasks, chosen.seed, chosen.seeds, chosen.growth = 32, 8, 0, 1, ()
        chosen.limits, chosen.iterations, chosen.methods = ("30",), (0, 20), QUICK_METHODS
    torch.set_num_threads(1)
    report = Report("oneshot", Options(chosen.json, chosen.quick, chosen.seed))
    run = _Run(chosen)
    rows = run.rows()
    grown = run.growth_rows()
    report.rows = rows + grown
    steps = max(chosen.iterations)
    found = tabulate(rows)
    for prefix, title, comparison in _comparisons(steps):
        gains = comparison.gains(found)
        report.figures |= {f"{prefix}.{name}": figure for name, figure in gains.items()}
        if gains:
            print(f"\n{title}: points over, 95 % interval over tasks, Holm-adjusted p")
            print(_comparison(gains, comparison.p_values(found)))
    report.figures |= {**_times(rows, found), **run.costs, **_growth(grown)}
    report.figures |= _break_even(report.figures, steps)
    if any(limit in RESOURCES for limit in chosen.limits):
        report.figures |= measured_ratios(run.backbone, rows, FOLDER / "measured")
    print(_accuracies(found))
    report.print_figures()
    report.write()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options_parser("oneshot", "accuracy of one cut out of the stock, beside other ways to a small model")
    methods = (*METHODS, *RIVALS)
    limits = ("50", "30", "15", *RESOURCES)
    parser.add_argument("--bank", type=int, default=32, metavar="N", help="past tasks, at most 32 (default 32)")
    parser.add_argument("--tasks", type=int, default=44, metavar="N", help="held-out tasks, at most 44 (default 44)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="chains, from --seed on (default 3)")
    parser.add_argument(
        "--limits",
        type=_one_of(limits, numbers=True),
        default=limits,
        metavar="LIMITS",
        help=f"per cent of the parameters, {' or '.join(RESOURCES)} (default {','.join(limits)})",
    )
    parser.add_argument("--iterations", type=_numbers, default=(0, 20, 50), metavar="N", help="default 0,20,50")
    parser.add_argument(
        "--methods", type=_one_of(methods), default=methods, metavar="NAMES", help=f"default {','.join(methods)}"
    )
    parser.add_argument(
        "--growth", type=_numbers, default=(1, 2, 5, 10, 20), metavar="N", help="smaller banks (default 1,2,5,10,20)"
    )
    parser.add_argument("--finished", action="store_true", help="report the finished cells among these, and make none")
    parser.add_argument("--development", action="store_true", help="the tasks for choosing settings, not the held-out")
    return parser


def _comparisons(steps: int) -> Iterator[tuple[str, str, Comparison]]:
    rivals = f"rivals after {steps} iterations"
    yield "gain_scorer", f"masks at equal start, all after {steps}", Comparison(("composed", steps), MASKS, steps)
    yield "gain", f"whole product, all after {steps} iterations", Comparison(("product", steps), WHOLE, steps)
    yield "gain_at_once", f"product without iterations, {rivals}", Comparison(("product", 0), WHOLE, steps)


def cells_of(past: Sequence[str], stock: StockSettings, more_code: Sequence[str] = ()) -> Cells:
    """Finished cells of this code, data and machine, for these past tasks."""
    data = hashlib.sha256((DATA / PACK).read_bytes()).hexdigest()
    settings = {"data": data, "stock": asdict(stock), "past": past, "per_class": PER_CLASS}
    return Cells.of(FOLDER / "cells", (*CODE, *more_code), **settings)


class _Run:
    """All cells that were asked for, made or found."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self.backbone = Backbone.load(image_size=64)
        self._settings = QUICK_STOCK if chosen.quick else STOCK
        self._past = task_names("bank")[: chosen.bank]
        self._new = task_names("development" if chosen.development else "held-out")[: chosen.tasks]
        self._cells = cells_of(self._past, self._settings)
        self._rival_cells = cells_of(self._past, self._settings, RIVAL_CODE)
        self._reused = 0
        self.costs: dict[str, Figure] = {}

    def rows(self) -> list[dict[str, Any]]:
        """One for every seed, limit, task, method and number of iterations."""
        chosen, rows = self._chosen, []
        for seed in range(chosen.seed, chosen.seed + chosen.seeds):
            chain = self._chain(self._past, seed)
            for name in chosen.limits:
                for task in self._new:
                    made = [self._row(chain, task, name, method, its) for method, its in self._jobs()]
                    found = [row for row in made if row is not None]
                    rows += found
                    told = ", ".join(f"{row['method']}/{row['iterations']} {row['accuracy']:.1%}" for row in found)
                    print(f"seed {seed}, {name}, {task}: {told}", file=sys.stderr, flush=True)
            if rows and rows[-1]["seed"] == seed:
                self.costs |= {f"seconds.{name}": Figure(value, "s") for name, value in chain.seconds.items()}
        print(f"{self._reused} of {len(rows)} cells come from earlier runs of the same code, data and machine")
        return rows

    def growth_rows(self) -> list[dict[str, Any]]:
        """The product without iterations, on stocks and banks of the first n past tasks, with one seed."""
        rows = []
        sizes = [*self._chosen.growth, len(self._past)] if self._chosen.growth else []
        for size in sizes:
            chain = self._chain(self._past[:size], self._chosen.seed)
            for task in self._new:
                prefix = "" if size == len(self._past) else f"bank-{size}-"
                row = self._row(chain, task, GROWTH_LIMIT, "product", 0, prefix)
                if row is not None:
                    rows.append({**row, "bank": size})
            told = [row["accuracy"] for row in rows if row["bank"] == size]
            print(f"bank of {size}: {np.mean(told):.1%} on {len(told)} tasks", file=sys.stderr, flush=True)
        return rows

    def _chain(self, past: Sequence[str], seed: int) -> Chain:
        folder = chain_folder(FOLDER, self._cells.digest, past, seed)
        fill = shipped_bank if self._chosen.quick else None
        return Chain(self.backbone, tuple(past), self._settings, seed, folder, fill)

    def _limit(self, name: str, chain: Chain) -> Limit:
        resource = RESOURCES.get(name)
        if resource is None:
            return ShareLimit(self.backbone, int(name))
        profile = device_profile(self.backbone, FOLDER / self._cells.digest[:16] / "profile")
        reference = ShareLimit(self.backbone, REFERENCE_PERCENT).solved(chain.mean)
        return DeviceLimit(self.backbone, profile, resource, reference)

    def _jobs(self) -> list[tuple[str, int]]:
        chosen = self._chosen
        return [(method, its) for its in chosen.iterations for method in chosen.methods if its or method in AT_ONCE]

    def _row(
        self, chain: Chain, name: str, limit: str, method: str, iterations: int, prefix: str = ""
    ) -> dict[str, Any] | None:
        """A finished cell, or one that is made now; None if only finished ones are wanted and it is not."""

        def line() -> Line:
            task = load_task(name, seed=chain.seed)
            samples = task.split("train").few_shot(PER_CLASS, chain.seed)
            return Line(samples, task.split("test"), len(task.labels), self._limit(limit, chain), chain.seed)

        def made() -> dict[str, Any]:
            return Contest(chain, line()).run(method, iterations)

        def alternative() -> dict[str, Any]:
            return Rival(self.backbone, line()).run(method, iterations)

        of_limit = "" if method in RIVALS else f"{limit}-"
        key = f"{prefix}{chain.seed}-{name}-{of_limit}{method}-{iterations}"
        cells, make = (self._rival_cells, alternative) if method in RIVALS else (self._cells, made)
        if self._chosen.finished and not cells.has(key):
            return None
        result, reused = cells.get(key, make)
        self._reused += reused
        head = {"seed": chain.seed, "task": name, "kin": kinship(name), "limit": limit, "method": method}
        return rounded({**head, "iterations": iterations, **result, "reused": reused})


def _growth(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Accuracy by size of the bank, and what each size gains over the one before."""
    by_size: dict[int, dict[str, float]] = {}
    for row in rows:
        by_size.setdefault(row["bank"], {})[row["task"]] = row["accuracy"]
    values = {size: np.array([of[task] for task in sorted(of)]) for size, of in by_size.items()}
    figures = {f"growth.{size}@{GROWTH_LIMIT}": Figure(float(of.mean()), "share") for size, of in values.items()}
    for before, after in zip(values, [*values][1:], strict=False):
        figures[f"growth_gain.{before}-{after}@{GROWTH_LIMIT}"] = gain(values[after], values[before])
    return figures


def _times(rows: Sequence[dict[str, Any]], found: Table) -> dict[str, Figure]:
    """Seconds of each method; the product's least time to the accuracy of task-specific pruning over the latter's.

    Of both the cheapest number of iterations counts: of task-specific pruning the one with its best mean accuracy, of
    the product the first that is as good; None if none is. And after how many lines the past is paid back in seconds.
    """
    seconds = tabulate(rows, "seconds")

    def mean(table: Table, key: Key, like: Key) -> float:
        return float(over_seeds(table, key, like).mean())

    figures = {
        f"seconds.{method}@{limit}.{its}": Figure(mean(seconds, key, key), "s")
        for key in seconds
        for method, limit, its in [key]
    }
    for limit in dict.fromkeys(limit for _, limit, _ in found):
        rivals = sorted((key for key in found if key[:2] == ("task_specific", limit)), key=lambda key: key[2])
        ours = sorted((key for key in found if key[:2] == ("product", limit)), key=lambda key: key[2])
        if not rivals or not ours:
            continue
        best = max(rivals, key=lambda key: mean(found, key, key))
        equal = next((key for key in ours if mean(found, key, best) >= mean(found, best, key)), None)
        ratio = mean(seconds, equal, best) / mean(seconds, best, equal) if equal else None
        figures[f"time_ratio.task_specific@{limit}"] = Figure(ratio, "ratio")
    return figures


def _break_even(figures: dict[str, Figure], steps: int) -> dict[str, Figure]:
    """After how many lines the seconds of bank and stock are saved, the product without iterations beside the rival."""
    past = sum(figures[name].value or 0.0 for name in ("seconds.bank", "seconds.stock") if name in figures)
    found = {}
    for name, figure in figures.items():
        if name.startswith("seconds.task_specific@") and name.endswith(f".{steps}"):
            limit = name.removeprefix("seconds.task_specific@").removesuffix(f".{steps}")
            ours = figures.get(f"seconds.product@{limit}.0")
            saved = (figure.value or 0.0) - (ours.value or 0.0) if ours else 0.0
            if past and saved > 0:
                found[f"break_even_lines@{limit}"] = Figure(past / saved, "lines")
    return found


def _comparison(figures: dict[str, Figure], p_values: dict[str, float]) -> str:
    rows = []
    for rival, figure in figures.items():
        low, high = figure.ci95 or (np.nan, np.nan)
        rows.append((rival, show(figure.value, "+.1f"), f"[{low:+.1f}, {high:+.1f}]", show(p_values[rival], ".2g")))
    return table(("over", "points", "95 %", "p"), rows)


def _accuracies(found: Table) -> str:
    rows = [
        (method, limit, str(its), show(100 * float(over_seeds(found, key).mean()), ".1f"), str(len(found[key])))
        for key in sorted(found, key=lambda key: (key[1], key[2], key[0]))
        for method, limit, its in [key]
    ]
    return table(("method", "limit", "iterations", "accuracy %", "seeds"), rows)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _one_of(known: Sequence[str], *, numbers: bool = False) -> Callable[[str], tuple[str, ...]]:
    """Reads names of ``known``, and numbers from 1 to 100 if these are allowed."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known and not (numbers and name.isdecimal() and 1 <= int(name) <= 100):
                raise argparse.ArgumentTypeError(f"there is no {name!r}; known: {', '.join(known)}")
        return names

    return read


if __name__ == "__main__":
    sys.exit(main())
