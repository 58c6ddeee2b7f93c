"""How far can the verdict on reuse be trusted, and does similarity earn weight? Tasks of a bank play new.

The bank tasks of the benchmark of reuse are assessed one by one by all others' records. Then measures are chosen
against the constant ranking, and the conformal bounds are tried on tasks that had no part in them, over random splits.
Every finished assessment is kept with the chain that it belongs to, and used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import msgspec
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.similarity.assess import assess, blank
from kiridashi_server.similarity.assessment import Assessment, AssessSettings, gains, statistics_of
from kiridashi_server.similarity.choice import Choice, choose_measure
from kiridashi_server.similarity.conformal import Coverage, VerdictSettings, coverage

from benchmarks.oneshot import FOLDER, STOCK, cells_of
from benchmarks.oneshot_chain import Chain, chain_folder
from benchmarks.oneshot_tasks import load_task, task_names
from benchmarks.report import Figure, Options, Report, options_parser, table

SPLITS = 1000
ALPHAS = (0.1, 0.2)


def main(arguments: list[str] | None = None) -> int:
    """Assess, choose, try the bounds; print and write what came out."""
    parser = options_parser("verdict", "whether reuse is justified, foretold for tasks that play new")
    parser.add_argument("--bank", type=int, default=32, metavar="N", help="past tasks, at most 32 (default 32)")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.bank = 12
    torch.set_num_threads(1)
    report = Report("verdict", Options(chosen.json, chosen.quick, chosen.seed))
    assessed, reused = _assessed(chosen)
    print(f"{reused} of {len(assessed)} assessments come from earlier runs of the same code, data and machine")
    choice = choose_measure(assessed, seed=chosen.seed)
    report.rows = [_row(assessment) for assessment in assessed]
    report.figures = _figures(choice)
    print(_measures(choice), choice.reason, sep="\n")
    for alpha in ALPHAS:
        settings = VerdictSettings(alpha=alpha)
        found = coverage(gains(assessed), statistics_of(assessed), settings, splits=SPLITS, seed=chosen.seed)
        report.figures |= _coverage(alpha, found)
    report.print_figures()
    report.write()
    return 0


def _assessed(chosen: argparse.Namespace) -> tuple[list[Assessment], int]:
    backbone = Backbone.load(image_size=64)
    names = task_names("bank")[: chosen.bank]
    cells = cells_of(names, STOCK)
    chain = Chain(backbone, names, STOCK, chosen.seed, chain_folder(FOLDER, cells.digest, names, chosen.seed))
    settings, reused, found = AssessSettings(seed=chosen.seed), 0, []
    for name in names:
        task = load_task(name, seed=chosen.seed)

        def work(task: Any = task) -> dict[str, Any]:
            started = blank(backbone, task, settings)
            whole = assess(backbone, task, chain.records, settings, known=started, keep=lambda _: None)
            return dict(msgspec.to_builtins(whole))

        kept, again = cells.get(f"assessment-{len(names)}-{chosen.seed}-{name}", work)
        reused += again
        found.append(msgspec.convert(kept, Assessment))
        print(f"{name}: bank {found[-1].composed['uniform']:.1%}, own {found[-1].own:.1%}", file=sys.stderr, flush=True)
    return sorted(found, key=lambda assessment: assessment.task_digest), reused


def _row(assessment: Assessment) -> dict[str, Any]:
    composed, statistics = dict(assessment.composed), dict(assessment.statistics)
    return {"task": assessment.task, "own": assessment.own, "composed": composed, "statistics": statistics}


def _figures(choice: Choice) -> dict[str, Figure]:
    figures = {"chance": Figure(choice.chance, "share")}
    for row in choice.rows:
        figures[f"gain.{row.measure}"] = Figure(100 * row.gain, "points")
        figures[f"gain_error.{row.measure}"] = Figure(100 * row.gain_error, "points")
        figures[f"spearman.{row.measure}"] = Figure(row.spearman, "correlation")
    return figures


def _coverage(alpha: float, found: Coverage) -> dict[str, Figure]:
    wanted = f"{1 - alpha:.0%}".replace("%", "")
    values = dataclasses.asdict(found)
    names = {"lower": "share", "upper": "share", "both": "share", "kept": "share"}
    figures = {f"coverage_{name}.{wanted}": Figure(values[name], unit) for name, unit in names.items()}
    figures[f"width.{wanted}"] = Figure(100 * found.width, "points")
    figures |= {f"verdict_{name}.{wanted}": Figure(share, "share") for name, share in found.verdicts.items()}
    return figures


def _measures(choice: Choice) -> str:
    rows = [
        (
            row.measure,
            f"{row.spearman:+.2f} +- {row.spearman_error:.2f}",
            f"{100 * row.gain:+.1f} +- {100 * row.gain_error:.1f}",
            f"{100 * row.regret:.1f} +- {100 * row.regret_error:.1f}",
        )
        for row in choice.rows
    ]
    return table(("measure", "rank correlation", "gain, points", "regret, points"), rows)


if __name__ == "__main__":
    sys.exit(main())
