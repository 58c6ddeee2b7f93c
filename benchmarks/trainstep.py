"""What does tuning on the device cost, and what does it win back?

The train steps of a bundle beside torch doing the same update, one thread, taking turns: processor time, first
gradients, peak memory of fresh processes, size of an installation. Then accuracy on the device's own style, and what
the device's choice of a size loses against the best that would fit. On half of every group of EfficientNet-Lite0, and
of DINOv2 ViT-S/14 where its weights are installed (extra ``vit``).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from kiridashi.errors import KiridashiError
from kiridashi_server.tasks import load_shipped, shipped_names

from benchmarks.report import Figure, Options, Report, options_parser, rounded, table
from benchmarks.trainstep_accuracy import TORCH_RATES, make_line
from benchmarks.trainstep_costs import gradient_errors, installed_bytes, peak_memory, step_times
from benchmarks.trainstep_subject import CLASSES, Subject, make_subject

LITE0, VIT = "efficientnet-lite0", "dinov2-vits14"
RATES_FOUND_ON = ("roles-a", "roles-b")
"""Tasks on which the learning rates were chosen; they do not count here."""
_SHOTS, _ITERATIONS, _VIT_PIXELS = 6, 30, 112
_SIZES = ("head", "biases", "last-blocks", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables and figures, write the report after every part."""
    parser = options_parser("trainstep", "time, memory and accuracy of tuning on the device")
    parser.add_argument("--pixels", type=int, nargs="*", metavar="N", help="image sizes (default: 64 and 224)")
    parser.add_argument("--tasks", type=int, metavar="N", help="tasks of the part on accuracy (default: 4)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = Report("trainstep", Options(given.json, given.quick, given.seed))
    tasks = given.tasks if given.tasks is not None else (1 if given.quick else 4)
    sizes = given.pixels if given.pixels is not None else ([64] if given.quick else [64, 224])
    with tempfile.TemporaryDirectory() as scratch:
        small = None
        for pixels in sizes:
            subject = make_subject(LITE0, pixels, Path(scratch, f"lite0-{pixels}"), given.seed)
            _costs(report, f"lite0-{pixels}", subject, pixels, Path(scratch))
            small = subject if pixels == 64 else small
        _install(report)
        if tasks:
            small = small or make_subject(LITE0, 64, Path(scratch, "lite0"), given.seed)
            _accuracies(report, small, tasks, Path(scratch))
        if not given.quick:
            _vit(report, Path(scratch))
    report.print_figures()
    report.write()
    return 0


def _costs(report: Report, name: str, subject: Subject, pixels: int, scratch: Path) -> None:
    rounds = 8 if report.options.quick or pixels > 64 else 20
    lines = []
    for variant in subject.variants:
        key = f"{name}.{variant.entry.name}"
        times = step_times(subject, variant, pixels, rounds)
        fastest = min(times["torch_ms"], times["torch_channels_last_ms"])
        errors = gradient_errors(subject, variant, pixels)
        memory = peak_memory(subject, variant, pixels, scratch)
        graph = (subject.folder / variant.entry.graph).stat().st_size
        row = {"part": "costs", "name": key, **times, **errors, **memory, "graph_bytes": graph}
        report.rows.append(rounded(row))
        figures = {
            "time": Figure(times["ours_ms"] / fastest, "ratio"),
            "memory": Figure(memory["ours_bytes"] / memory["torch_bytes"], "ratio"),
            "memory_estimate": Figure(memory["estimate_bytes"] / memory["ours_bytes"], "ratio"),
            "gradient": Figure(errors["from_torch"], "share"),
            "from_float64": Figure(errors["from_float64"] / errors["torch_from_float64"], "ratio"),
        }
        report.figures |= {f"{key}.{what}": figure for what, figure in figures.items()}
        report.write()
        lines.append([key, *(f"{figure.value:.3g}" for figure in figures.values()), f"{graph / 1024:.0f}"])
    print(table(["train step", "time", "memory", "estimate", "gradient", "from float64", "graph KiB"], lines))


def _install(report: Report) -> None:
    ours, theirs = installed_bytes("numpy", "onnxruntime"), installed_bytes("numpy", "torch")
    report.rows.append({"part": "install", "ours": ours, "torch": theirs})
    report.figures["install"] = Figure(ours / theirs, "ratio")


def _accuracies(report: Report, subject: Subject, tasks: int, scratch: Path) -> None:
    lines, rows = [], []
    for name in [one for one in shipped_names() if one not in RATES_FOUND_ON][:tasks]:
        task = load_shipped(name)
        if len(task.labels) != CLASSES:
            raise ValueError(f"{name} has {len(task.labels)} classes")
        line = make_line(subject, task, _SHOTS, _ITERATIONS, scratch / name, report.options.seed)
        start = line.with_head()
        row = {"shipped": line.accuracy({}), "head": line.accuracy(start)}
        row |= {size: line.accuracy(line.tuned(size, start)) for size in _SIZES[1:]}
        row["torch"] = max(line.accuracy(line.tuned_by_torch(start, rate)) for rate in TORCH_RATES)
        rows.append(row)
        report.rows.append(rounded({"part": "accuracy", "task": name, **row}))
        report.write()
        lines.append([name, *(f"{100 * value:.1f}" for value in row.values())])
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    lines.append(["mean", *(f"{100 * value:.1f}" for value in means.values())])
    print(table(["task", *means], lines))
    report.figures |= {f"accuracy.{key}": Figure(value, "share") for key, value in means.items()}
    for count, largest in enumerate(_SIZES, 1):
        lost = [100 * (max(row[size] for size in _SIZES[:count]) - row[largest]) for row in rows]
        report.figures[f"choice_lost.up_to_{largest}"] = Figure(sum(lost) / len(lost), "points")
        report.figures[f"choice_lost_most.up_to_{largest}"] = Figure(max(lost), "points")


def _vit(report: Report, scratch: Path) -> None:
    try:
        subject = make_subject(VIT, _VIT_PIXELS, scratch / "vit", report.options.seed)
    except KiridashiError as error:
        print(f"{VIT} is not measured: {error}", file=sys.stderr)
        report.figures[f"vit-{_VIT_PIXELS}.all.time"] = Figure(None, "ratio")
        return
    _costs(report, f"vit-{_VIT_PIXELS}", subject, _VIT_PIXELS, scratch)


if __name__ == "__main__":
    sys.exit(main())
