"""Is a cut as fast as it was said to be, and inside its budget?

Random cuts that no model has seen, at 64 and 224 pixels, in onnxruntime and LiteRT: measured by the device's agent,
predicted by the profile, and by predictors that count multiply-accumulates or add up layers. Then random budgets,
solved, cut and measured. Then the speed of budget-solved cuts at equal accuracy, beside a uniform ratio and
torch-pruning's global pruning.

Exported cuts are kept under ``benchmark-results/latency`` and used again if the backbone, its size, the widths and this
version are the same; everything is measured anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from kiridashi.manifest import RuntimeName
from kiridashi_server.backbone import Backbone

from benchmarks.latency_budgets import keep_budgets
from benchmarks.latency_models import Case, Predicted, predict_cuts
from benchmarks.latency_speed import measure_speed
from benchmarks.report import Figure, Options, Report, options_parser, rounded, show, table

RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
PIXELS = (64, 224)
PREDICTORS = ("ours", "macs", "layer_sum", "layer_sum_scaled")
FOLDER = Path("benchmark-results/latency")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables and figures, write the report; 1 if a live model is outside its budget."""
    parser = options_parser("latency", "prediction errors, budgets kept, speed at equal accuracy")
    parser.add_argument("--no-speed", action="store_true", help="without the last part, which takes half of the time")
    parsed = parser.parse_args(arguments)
    options = Options(parsed.json, parsed.quick, parsed.seed)
    torch.set_num_threads(1)
    report = Report("latency", options)
    cases: list[tuple[Case, Predicted]] = []
    budgets: list[dict[str, Any]] = []
    for pixels in PIXELS[:1] if options.quick else PIXELS:
        backbone = Backbone.load("efficientnet-lite0", image_size=pixels)
        for runtime in RUNTIMES:
            case = Case(pixels, runtime, FOLDER / f"{pixels}-{runtime}-{options.seed}")
            found = predict_cuts(backbone, case, **_sizes(options), seed=options.seed)
            cases.append((case, found))
            kept = keep_budgets(
                backbone, found.profile, case.folder / "budgets", count=3 if options.quick else 10, seed=options.seed
            )
            budgets += [{"case": case.name, **row} for row in kept]
            _say(f"{case.name}: done")
    report.rows += [rounded({"part": "prediction", **row}) for _, found in cases for row in found.rows]
    report.rows += [rounded({"part": "budget", **row}) for row in budgets]
    report.figures.update(_prediction_figures(cases))
    report.figures.update(_budget_figures(budgets))
    if not parsed.no_speed:
        rows, figures = measure_speed(options, FOLDER / "speed")
        report.rows += [rounded({"part": "speed", **row}) for row in rows]
        report.figures.update(figures)
    _print_tables(cases, budgets)
    report.print_figures()
    report.write()
    return 0 if report.figures["budget_live_inside_share"].value == 1 else 1


def _sizes(options: Options) -> dict[str, Any]:
    return {"fitted": 12, "held_out": 6, "seconds": 45.0} if options.quick else _FULL


_FULL: dict[str, Any] = {"fitted": 32, "held_out": 16, "seconds": 120.0}


def _prediction_figures(cases: Sequence[tuple[Case, Predicted]]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for case, found in cases:
        errors = _errors(found, "ours")
        figures[f"median_error_pct.{case.name}"] = Figure(float(np.median(errors)), "%")
        figures[f"p90_error_pct.{case.name}"] = Figure(float(np.percentile(errors, 90)), "%")
        figures[f"repeatability_pct.{case.name}"] = Figure(float(100 * np.percentile(found.repeatability, 90)), "%")
        figures[f"drift_pct.{case.name}"] = Figure(100 * found.drift, "%")
        for name in PREDICTORS[1:]:
            if any(row[f"{name}_error"] is not None for row in found.rows):
                figures[f"median_error_pct.{case.name}.{name}"] = Figure(float(np.median(_errors(found, name))), "%")
    return figures


def _errors(found: Predicted, name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return 100 * np.abs([row[f"{name}_error"] for row in found.rows if row[f"{name}_error"] is not None])


def _budget_figures(budgets: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    live = [row for row in budgets if row["live"]]
    inside = [all(use <= 1 for use in row["used"].values()) for row in live]
    return {
        "budgets": Figure(len(budgets), "count"),
        "budget_live_share": Figure(len(live) / len(budgets), "share"),
        "budget_kept_share": Figure(float(np.mean([row["first_try"] for row in budgets])), "share"),
        "budget_live_inside_share": Figure(float(np.mean(inside)) if inside else None, "share"),
        "budget_use_median": Figure(float(np.median([row["use"] for row in live])) if live else None, "share"),
    }


def _print_tables(cases: Sequence[tuple[Case, Predicted]], budgets: Sequence[dict[str, Any]]) -> None:
    header = ("case", "multiple", "predictor", "median error %", "90th percentile %", "repeatability %")
    rows = []
    for case, found in cases:
        for name in PREDICTORS:
            errors = _errors(found, name)
            if len(errors):
                numbers = (np.median(errors), np.percentile(errors, 90), 100 * np.percentile(found.repeatability, 90))
                rows.append((case.name, str(found.profile.multiple), name, *(show(float(n), ".1f") for n in numbers)))
    print(table(header, rows))
    columns = ("case", "budget", "live", "first_try", "binding", "use")
    print(table(columns, [[_cell(row.get(column)) for column in columns] for row in budgets]))


def _cell(value: Any) -> str:
    return show(value, ".2f" if isinstance(value, float) else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
