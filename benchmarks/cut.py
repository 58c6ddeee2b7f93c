"""Is the cut exact on architectures that nobody adapted to it, and does it reach as far as torch-pruning?

``python -m benchmarks.cut --json OUT [--quick] [--seed N] [--models NAME ...] [--no-exports]``. For every model of the
zoo, or those named, in float64:

* the largest difference between the program and the model, and between the cut and the masked dense program:
  half of all groups at once, three times, and (without ``--quick``) half of each group by itself; a mask that
  does not change the output proves nothing and counts as not exact;
* the share of the parameters in tensors that a group cuts, and torch-pruning's. Both ways of the layout are
  measured: ``default``, where channels that are normalised together are frozen, and ``normalised``, where they
  are cut as torch-pruning does;
* seconds of the processor for layout and cut, beside torch-pruning's for building its graph and dropping half of
  each group;
* whether the cut program exports to ONNX (every fourth model with ``--quick``) and TFLite (not with
  ``--quick``), runs there, and agrees.

A model that raises anywhere before the exports counts as a crash, with what it raised.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from kiridashi_server.graph import GraphError, Layout, Plan, Tracking, capture, cut, masked, track
from torch import Tensor, fx, nn

from benchmarks import exports
from benchmarks.cells import Cells
from benchmarks.report import Figure, Options, Report, options_parser, rounded, show, table
from benchmarks.torch_pruning import OracleResult, prune_half
from benchmarks.zoo import ZOO, Entry

EXACT = 1e-12
_CODE = ("benchmarks", "server_tools/kiridashi_server/graph", "server_tools/kiridashi_server/export")
_REPEATS = 3
_TIMED = 5
_KINDS = ("onnx", "tflite")
_QUICK_EXPORTS = 4


def main(arguments: list[str] | None = None) -> int:
    """Measure the whole zoo, print the table and write the report; 1 if a model crashed or was not exact."""
    parser = options_parser("cut", "the zoo: exactness, reach and time of the cut")
    parser.add_argument("--models", nargs="+", choices=ZOO, default=list(ZOO), metavar="NAME", help="only these models")
    parser.add_argument("--no-exports", action="store_true", help="without the runtimes, which take most of the time")
    parsed = parser.parse_args(arguments)
    options = Options(parsed.json, parsed.quick, parsed.seed)
    report = Report("cut", options)
    torch.set_num_threads(1)
    cells = Cells.of_environment(_CODE, quick=options.quick, seed=options.seed, exports=not parsed.no_exports)
    for name in parsed.models:
        kinds = _kinds(name, options) if not parsed.no_exports else ()
        with _quiet():
            row, reused = cells.get(name, partial(_model, name, kinds, options))
        report.rows.append(row | {"reused": reused})
        print(_line(row) + (" (reused)" if reused else ""), file=sys.stderr, flush=True)
    report.figures.update(figures(report.rows))
    print(_table(report.rows))
    print()
    report.print_figures()
    report.write()
    return 0 if report.figures["crashes"].value == 0 and report.figures["exact_share"].value == 1 else 1


def _kinds(name: str, options: Options) -> tuple[str, ...]:
    if not options.quick:
        return _KINDS
    return ("onnx",) if list(ZOO).index(name) % _QUICK_EXPORTS == 0 else ()


def _model(name: str, kinds: tuple[str, ...], options: Options) -> dict[str, Any]:
    row = measure(name, ZOO[name], quick=options.quick, seed=options.seed)
    if not row["error"]:
        row.update(_exports(name, options.seed, row["dynamic_batch"], kinds))
    return rounded(row)


def measure(name: str, entry: Entry, *, quick: bool, seed: int) -> dict[str, Any]:
    """One row of the report; an error is part of the row."""
    row: dict[str, Any] = {"model": name, "package": entry.package, "job": entry.job, "error": ""}
    try:
        model, inputs = entry.build(seed), entry.inputs(2, seed)
        row.update(_cut(model, inputs, quick=quick, seed=seed))
    except Exception as error:  # noqa: BLE001 - a crash is a result, whatever it is
        row["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return row


def _cut(model: nn.Module, inputs: tuple[Tensor, ...], *, quick: bool, seed: int) -> dict[str, Any]:
    started = time.process_time()
    program, dynamic = _capture(model, inputs)
    row: dict[str, Any] = {"dynamic_batch": dynamic, "seconds.capture": time.process_time() - started}
    with torch.no_grad():
        row["diff.capture"] = _largest(_outputs(program(*inputs)), _outputs(model(*inputs)))
    row["parameters"] = sum(parameter.numel() for parameter in program.parameters())
    rng = np.random.default_rng(seed)
    worst = row["diff.capture"]
    for way in ("default", "normalised"):
        tracking = track(program, cut_normalised=way == "normalised")
        row[f"groups.{way}"] = len(tracking.layout.groups)
        row[f"reach.{way}"] = _reach(program, tracking.layout)
        row[f"frozen_by.{way}"] = _reasons(tracking)
        row[f"diff.{way}"] = _difference(program, tracking, inputs, _plans(tracking.layout, rng, quick), row)
        worst = max(worst, row[f"diff.{way}"])
    row["exact"] = worst <= EXACT and row["effect"] > EXACT
    row.update(_beside_the_oracle(model, program, inputs, tracking, seed, row["seconds.capture"]))
    return row


def _capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[fx.GraphModule, bool]:
    """The program with an open batch if the model has one, else with the batch fixed."""
    try:
        return capture(model, inputs), True
    except GraphError:
        return capture(model, inputs, dynamic_batch=False), False


def _reach(program: fx.GraphModule, layout: Layout) -> float:
    cut_names = {member.parameter for group in layout.groups for member in group.members}
    sizes = {name: parameter.numel() for name, parameter in program.named_parameters()}
    return sum(sizes[name] for name in cut_names) / sum(sizes.values())


def _reasons(tracking: Tracking) -> list[str]:
    """Why parameter axes are frozen, apart from those of the input and the output."""
    return sorted({axis.reason for axis in tracking.layout.frozen} - {"input", "output"})


def _plans(layout: Layout, rng: np.random.Generator, quick: bool) -> Iterator[Plan]:
    """Half of all groups, three times; and half of each group by itself."""
    halves = [list(layout.groups)] * _REPEATS + ([] if quick else [[group] for group in layout.groups])
    for groups in halves:
        chosen = {group.name: rng.choice(group.size, max(1, group.size // 2), replace=False) for group in groups}
        yield Plan.of(layout, chosen)


def _difference(
    program: fx.GraphModule, tracking: Tracking, inputs: tuple[Tensor, ...], plans: Iterator[Plan], row: dict[str, Any]
) -> float:
    """The largest difference between cut and masked; the smallest effect of the first masks goes into ``row``."""
    worst, count = 0.0, 0
    with torch.no_grad():
        whole = _outputs(program(*inputs))
        for count, plan in enumerate(plans):
            dense = _outputs(masked(program, tracking, plan)(*inputs))
            small = _outputs(cut(program, tracking, plan)(*inputs))
            difference = _largest(small, dense)
            worst = difference if difference != difference else max(worst, difference)
            if count < _REPEATS:
                row["effect"] = min(row.get("effect", float("inf")), _largest(dense, whole))
    return worst


def _outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _largest(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


def _beside_the_oracle(
    model: nn.Module,
    program: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    tracking: Tracking,
    seed: int,
    capture_seconds: float,
) -> dict[str, Any]:
    """Reach and time of both, in turn; the layout that cuts normalised channels, as torch-pruning does."""
    outputs = _output_modules(model, tracking.layout)
    ours: list[tuple[float, float]] = []
    theirs: list[OracleResult] = []
    for _ in range(_TIMED):
        gc.collect()  # what others left behind is no part of either time
        started = time.process_time()
        again = track(program, cut_normalised=True)
        between = time.process_time()
        halves = {group.name: range(max(1, group.size // 2)) for group in again.layout.groups}
        cut(program, again, Plan.of(again.layout, halves))
        ours.append((between - started, time.process_time() - between))
        if not theirs or not theirs[0].error:
            theirs.append(prune_half(model, inputs, outputs, tracking.parameters, seed))
    oracle = theirs[0]
    row: dict[str, Any] = {f"tp.{key}": value for key, value in asdict(oracle).items()}
    row["seconds.layout"], row["seconds.cut"] = (statistics.median(column) for column in zip(*ours, strict=True))
    if oracle.seconds is not None and oracle.reach:
        row["tp.seconds"] = statistics.median(result.seconds for result in theirs if result.seconds is not None)
        row["time_vs_tp"] = (row["seconds.layout"] + row["seconds.cut"]) / row["tp.seconds"]
        row["time_total_vs_tp"] = row["time_vs_tp"] + capture_seconds / row["tp.seconds"]
        row["coverage_vs_tp"] = _reach(program, tracking.layout) / oracle.reach
    return row


def _output_modules(model: nn.Module, layout: Layout) -> list[str]:
    """Modules whose outputs are the model's: those with a parameter whose first axis is frozen for that reason."""
    owners = {axis.parameter.rpartition(".")[0] for axis in layout.frozen if axis.reason == "output" and axis.axis == 0}
    modules = dict(model.named_modules())
    return sorted(owner for owner in owners if owner in modules)


def _exports(name: str, seed: int, dynamic_batch: bool, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Differences of the runtimes from torch, and what went wrong; an export that disagrees failed."""
    row: dict[str, Any] = {}
    for kind in kinds:
        started = time.perf_counter()
        result = exports.apart if kind == "tflite" else exports.here  # a compiler may take its process down
        row |= {f"{kind}.{key}": value for key, value in asdict(result(kind, name, seed, dynamic_batch)).items()}
        row[f"{kind}.seconds"] = time.perf_counter() - started
    return row


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """The summary; a ratio to torch-pruning counts where torch-pruning gave a result."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    def agreed(kind: str) -> float | None:
        tried = [row[f"{kind}.difference"] for row in rows if f"{kind}.difference" in row]
        return sum(one is not None and one <= exports.TOLERANCE for one in tried) / len(tried) if tried else None

    def median(name: str) -> float | None:
        return statistics.median(column(name)) if column(name) else None

    return {
        "models": Figure(len(rows), "models"),
        "models.transformers": Figure(sum(row["package"] == "transformers" for row in rows), "models"),
        "crashes": Figure(sum(bool(row["error"]) for row in rows), "models"),
        "exact_share": Figure(sum(bool(row.get("exact")) for row in rows) / len(rows), "share"),
        "max_abs_diff_f64": Figure(max([*column("diff.default"), *column("diff.normalised")], default=None), "output"),
        "coverage_vs_tp.min": Figure(min(column("coverage_vs_tp"), default=None), "ratio"),
        "coverage_default_vs_tp.min": Figure(
            min((row["reach.default"] / row["tp.reach"] for row in rows if row.get("coverage_vs_tp")), default=None),
            "ratio",
        ),
        "time_vs_tp.median": Figure(median("time_vs_tp"), "ratio"),
        "time_vs_tp.max": Figure(max(column("time_vs_tp"), default=None), "ratio"),
        "time_total_vs_tp.median": Figure(median("time_total_vs_tp"), "ratio"),
        "tp.crashes": Figure(sum(bool(row.get("tp.error")) for row in rows), "models"),
        "tp.broken": Figure(sum(row.get("tp.runs") is False for row in rows), "models"),
        "export_share.onnx": Figure(agreed("onnx"), "share"),
        "export_share.tflite": Figure(agreed("tflite"), "share"),
    }


_HEADER = (
    *("model", "job", "package", "params", "groups", "reach", "norm: groups", "reach", "tp: groups", "reach", "runs"),
    *("max diff", "exact", "capture s", "layout s", "cut s", "tp s", "onnx", "tflite"),
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        row["job"],
        row["package"],
        show(row.get("parameters"), "d"),
        show(row.get("groups.default"), "d"),
        show(row.get("reach.default"), ".2f"),
        show(row.get("groups.normalised"), "d"),
        show(row.get("reach.normalised"), ".2f"),
        show(row.get("tp.groups"), "d"),
        show(row.get("tp.reach"), ".2f"),
        show(row.get("tp.runs")),
        show(max((row[key] for key in row if key.startswith("diff.")), default=None), ".0e"),
        show(row.get("exact")),
        show(row.get("seconds.capture"), ".1f"),
        show(row.get("seconds.layout"), ".3f"),
        show(row.get("seconds.cut"), ".3f"),
        show(row.get("tp.seconds"), ".3f"),
        show(row.get("onnx.difference"), ".0e"),
        show(row.get("tflite.difference"), ".0e"),
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [table(_HEADER, [_cells(row) for row in rows])]
    for row in rows:
        lines += [f"{row['model']}: {key} {row[key]}" for key in row if key.endswith(("error", ".uncut")) and row[key]]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    exported = [f"{kind} {show(row[f'{kind}.difference'], '.0e')}" for kind in _KINDS if f"{kind}.difference" in row]
    return ", ".join([f"{row['model']}: {row['error'] or ('exact' if row['exact'] else 'NOT exact')}", *exported])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries' warnings and chatter stay out of the table."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        stack.callback(logging.disable, before)
        yield


if __name__ == "__main__":
    sys.exit(main())
