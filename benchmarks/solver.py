"""How far from the optimum is the budget solver, and how long does it take?

``python -m benchmarks.solver --json OUT [--quick] [--seed N]``. Two questions, with random scores:

* on the layouts of EfficientNet-Lite0 and ViT-B/16 at a multiple of 8: seconds of processor time and the stated gap,
  under one, two and three limits, and the same for the whole front of parameters;
* on a small network, and on EfficientNet-Lite0 at coarser multiples: the value and the bound beside the optimum of an
  integer linear program, solved by HiGHS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from kiridashi_server.budget.front import front
from kiridashi_server.budget.knapsack import solve
from kiridashi_server.budget.problem import Choice, Resource
from kiridashi_server.graph.polynomial import Polynomial, evaluate

from benchmarks.knapsacks import ilp_optimum, inverted_residuals, small_network, vision_transformer
from benchmarks.report import Figure, Report, parse_options, rounded, show, table

LAYOUTS: dict[str, Callable[[int], tuple[list[Choice], Polynomial, Polynomial]]] = {
    "efficientnet-lite0": inverted_residuals,
    "vit-b": vision_transformer,
}
SHARES = ((0.5,), (0.15,), (0.4, 0.3), (0.2, 0.15), (0.5, 0.4, 0.5))
_ROUNDING = 1e-6
Result = TypeVar("Result")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables and write the report; 1 if a bound did not hold."""
    options = parse_options("solver", "gap and time of the budget solver", arguments)
    report = Report("solver", options)
    seeds = range(options.seed, options.seed + (1 if options.quick else 3))
    report.rows += [rounded(row) for seed in seeds for row in (*_layouts(seed), *_beside_the_ilp(seed, options.quick))]
    report.figures.update(_figures(report.rows))
    columns = ("instance", "seed", "shares", "seconds", "gap", "ilp_seconds", "short_of_ilp", "bound_over_ilp")
    print(table(columns, [[_cell(row.get(column)) for column in columns] for row in report.rows]))
    report.print_figures()
    report.write()
    return 0 if report.figures["bound_held_share"].value == 1 else 1


def _cell(value: Any) -> str:
    return show(value, ".2g" if isinstance(value, float) else "")


def _layouts(seed: int) -> list[dict[str, Any]]:
    rows = []
    for name, layout in LAYOUTS.items():
        choices, parameters, macs = layout(seed)
        for shares in SHARES:
            row = {"instance": name, "seed": seed, "shares": ", ".join(map(str, shares))}
            rows.append(row | _solved(choices, _resources(choices, parameters, macs, shares)))
        seconds, points = _timed(lambda choices=choices, parameters=parameters: front(choices, [parameters]))
        gap = max(point.bound / point.value - 1 for point in points)
        rows.append({"instance": f"{name} front", "seed": seed, "shares": "", "seconds": seconds, "gap": gap})
    return rows


def _beside_the_ilp(seed: int, quick: bool) -> list[dict[str, Any]]:
    instances = [("small", shares, small_network(seed, shares)) for shares in ((0.5,), (0.25,), (0.5, 0.4))]
    for multiple in (64,) if quick else (64, 32, 16):
        choices, parameters, macs = inverted_residuals(seed, multiple=multiple)
        for shares in ((0.4,), (0.4, 0.5)):
            name = f"efficientnet-lite0, multiple {multiple}"
            instances.append((name, shares, (choices, _resources(choices, parameters, macs, shares))))
    rows = []
    for name, shares, (choices, resources) in instances:
        row = {"instance": name, "seed": seed, "shares": ", ".join(map(str, shares))} | _solved(choices, resources)
        seconds, exact = _timed(lambda choices=choices, resources=resources: ilp_optimum(choices, resources))
        row |= {
            "ilp_seconds": seconds,
            "short_of_ilp": 1 - row["value"] / exact,
            "bound_over_ilp": row["value"] * (1 + row["gap"]) / exact - 1,
        }
        rows.append(row)
    return rows


def _resources(
    choices: Sequence[Choice], parameters: Polynomial, macs: Polynomial, shares: Sequence[float]
) -> list[Resource]:
    """Shares of the parameters, of the computation, and of the mean of both."""
    dense = {choice.group: int(choice.widths[-1]) for choice in choices}
    file, latency = (
        tuple((coefficient / evaluate(terms, dense), names) for coefficient, names in terms)
        for terms in (parameters, macs)
    )
    both = tuple((coefficient / 2, names) for coefficient, names in (*file, *latency))
    needs = {"file": file, "latency": latency, "memory": both}
    return [Resource(name, terms, share) for (name, terms), share in zip(needs.items(), shares, strict=False)]


def _solved(choices: Sequence[Choice], resources: Sequence[Resource]) -> dict[str, Any]:
    seconds, optimum = _timed(lambda: solve(choices, resources))
    if optimum is None:
        raise ValueError("the smallest widths break a limit")
    return {"seconds": seconds, "value": optimum.value, "gap": optimum.gap}


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    figures = {}
    for name in (*LAYOUTS, *(f"{name} front" for name in LAYOUTS)):
        chosen = [row for row in rows if row["instance"] == name]
        figures[f"seconds_max.{name}"] = Figure(max(row["seconds"] for row in chosen), "s")
        figures[f"gap_max.{name}"] = Figure(max(row["gap"] for row in chosen), "ratio")
    beside = [row for row in rows if "ilp_seconds" in row]
    held = np.mean([row["bound_over_ilp"] >= -_ROUNDING for row in beside])
    figures["short_of_ilp_max"] = Figure(max(row["short_of_ilp"] for row in beside), "ratio")
    figures["bound_held_share"] = Figure(float(held), "share")
    figures["ilp_time_ratio"] = Figure(
        float(np.median([row["seconds"] / row["ilp_seconds"] for row in beside])), "ratio"
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())
