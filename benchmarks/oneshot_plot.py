"""Pictures of the benchmark of reuse: ``python -m benchmarks.oneshot_plot --json IN --gains OUT --growth OUT``.

``IN`` is the report of ``python -m benchmarks.oneshot``. The first picture shows what the product gains over every
rival, with 95 % intervals over tasks; the second its accuracy by the size of the bank.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kiridashi.artifacts import write_atomic
from matplotlib import rc_context
from matplotlib.figure import Figure

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "kiridashi", "font.family": "sans-serif", "font.size": 10}
_OURS, _GREY = "#c8452e", "#8a94a0"
_LABELS: Mapping[str, str] = {
    "nested_l1": "nested widths, tuned on past tasks",
    "tuned_taylor": "own Taylor scores, tuned backbone",
    "uniform_bank": "bank's mean, no stock",
    "amp_few": "own learnt scores",
    "taylor": "own Taylor scores",
    "l1": "L1 norms",
    "random": "random units",
    "tp_taylor": "torch-pruning, Taylor",
    "tp_magnitude": "torch-pruning, magnitude",
    "task_specific": "task-specific, step by step",
    "tuned_task_specific": "task-specific, tuned backbone",
    "small_native": "SqueezeNet 1.1",
    "dense_int8": "dense, int8",
    "dense": "dense, float32",
}
_TITLES: Mapping[str, str] = {"latency": "equal latency", "memory": "equal memory"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the report, write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oneshot_plot", description=__doc__.partition(":")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="IN", help="the report of benchmarks.oneshot")
    parser.add_argument("--gains", type=Path, required=True, metavar="OUT", help="picture of the gains over rivals")
    parser.add_argument("--growth", type=Path, metavar="OUT", help="picture of growth with the bank")
    parsed = parser.parse_args(arguments)
    figures = json.loads(parsed.json.read_bytes())["figures"]
    write_atomic(parsed.gains, gains_picture(figures).encode())
    if parsed.growth:
        write_atomic(parsed.growth, growth_picture(figures).encode())
    return 0


def gains_picture(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """One panel for each limit; right of the line the product is ahead."""
    named = {name.removeprefix("gain_at_once."): of for name, of in figures.items() if name.startswith("gain_at_once.")}
    limits = [*dict.fromkeys(name.partition("@")[2] for name in named)]
    rivals = [rival for rival in _LABELS if any(name.partition("@")[0] == rival for name in named)]
    with rc_context(_STYLE):
        figure = Figure(figsize=(3.2 + 2.4 * len(limits), 0.9 + 0.34 * len(rivals)), layout="constrained")
        panels = figure.subplots(1, len(limits), sharey=True, sharex=True, squeeze=False)[0]
        for axes, limit in zip(panels, limits, strict=True):
            for place, rival in enumerate(reversed(rivals)):
                found = named.get(f"{rival}@{limit}")
                if found is None:
                    continue
                low, high = found["ci95"]
                colour = _OURS if low > 0 else _GREY
                axes.plot([low, high], [place, place], color=colour, lw=2)
                axes.plot([found["value"]], [place], "o", color=colour, ms=5)
            axes.axvline(0, color="black", lw=0.8)
            axes.set_title(_TITLES.get(limit, f"{limit} % of the parameters"), fontsize=10)
            axes.set_yticks(range(len(rivals)), [_LABELS[rival] for rival in reversed(rivals)])
            axes.grid(axis="x", color="#dddddd", lw=0.6)
        figure.supxlabel("points that the product is ahead, 95 % over tasks", fontsize=10)
        return _svg(figure)


def growth_picture(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy of the product without iterations over the number of past tasks."""
    points = sorted(
        (int(name.removeprefix("growth.").partition("@")[0]), 100 * of["value"])
        for name, of in figures.items()
        if name.startswith("growth.")
    )
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o-", color=_OURS)
        axes.set_xscale("log", base=2)
        axes.set_xticks([size for size, _ in points], [str(size) for size, _ in points])
        axes.set_xlabel("past tasks in the bank")
        axes.set_ylabel("accuracy of new lines, %")
        axes.grid(color="#dddddd", lw=0.6)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
