"""The report's pictures, as SVG text that takes its ink colour from the page."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from kiridashi_server.report.schema import EvidenceEntry, ResultEntry, StageEntry

INK = "#1b2530"
MUTED = "#7d8996"
ACCENT = "#c8452e"
COLOURS = {
    "one-shot": ACCENT,
    "uniform bank": "#e0a13c",
    "l1": "#3f78a8",
    "random": "#9aa7b4",
    "task-specific iterative": "#3d8f6f",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kiridashi",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy_against_size(results: Sequence[ResultEntry]) -> str:
    """Accuracy over kept parameters, a line a method, with 95 % intervals."""
    with rc_context(_STYLE):
        figure, axes = _figure(7.2, 4.0)
        methods = list(dict.fromkeys(result.method for result in results))
        for index, method in enumerate(methods):
            points = sorted((r for r in results if r.method == method), key=lambda r: r.kept_params)
            offset = 1 + 0.012 * (index - len(methods) / 2)
            x = [point.kept_params / 1e6 * offset for point in points]
            y = [100 * point.accuracy for point in points]
            spread = [
                [100 * max(0.0, point.accuracy - point.low) for point in points],
                [100 * max(0.0, point.high - point.accuracy) for point in points],
            ]
            colour = COLOURS.get(method, "#6b5ca5")
            wide = method == "one-shot"
            axes.errorbar(x, y, yerr=spread, color=colour, lw=1, capsize=2, alpha=0.45, fmt="none")
            axes.plot(
                x,
                y,
                color=colour,
                marker="o",
                lw=2.6 if wide else 1.4,
                ms=7 if wide else 5,
                label=method,
                zorder=3 if wide else 2,
            )
        axes.set_xlabel("parameters kept (million)")
        axes.set_ylabel("accuracy on the line's test images (%)")
        axes.grid(axis="y", color=MUTED, alpha=0.25)
        figure.legend(frameon=False, loc="outside lower center", ncols=len(methods))
        return _svg(figure, "Accuracy against size, by method")


def importance_against_size(points: Sequence[tuple[float, float]], unit: str) -> str:
    """The share of importance that each size keeps; ``points`` are (size in ``unit``, share), sizes rising."""
    with rc_context(_STYLE):
        figure, axes = _figure(6.4, 4.0)
        axes.plot(*zip(*points, strict=True), color=ACCENT, marker="o", ms=4, lw=1.8, drawstyle="steps-post")
        if points[-1][0] > 10 * points[0][0]:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(unit)
        axes.set_ylabel("importance kept")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color=MUTED, alpha=0.25)
        return _svg(figure, "Importance against size")


def evidence_weights(evidence: Sequence[EvidenceEntry]) -> str:
    """Weight of every past task in the composition, with its similarity beside it."""
    ordered = sorted(evidence, key=lambda entry: (entry.weight, entry.similarity))
    with rc_context(_STYLE):
        figure, axes = _figure(5.2, 0.36 * len(ordered) + 0.9)
        axes.barh(
            [entry.task for entry in ordered],
            [100 * entry.weight for entry in ordered],
            color=ACCENT,
            height=0.6,
        )
        for row, entry in enumerate(ordered):
            axes.text(100 * entry.weight + 0.3, row, f"similarity {entry.similarity:.2f}", va="center", color=MUTED)
        axes.set_xlabel("weight in the composed scores (%)")
        axes.margins(x=0.3)
        return _svg(figure, "Weights of the past tasks")


def stage_times(stages: Sequence[StageEntry]) -> str:
    """Seconds of every stage, in order."""
    with rc_context(_STYLE):
        figure, axes = _figure(5.2, 0.32 * len(stages) + 0.9)
        names = [stage.name for stage in stages][::-1]
        seconds = [stage.seconds for stage in stages][::-1]
        colours = [MUTED if stage.reused else "#3f78a8" for stage in stages][::-1]
        axes.barh(names, seconds, color=colours, height=0.6)
        for row, value in enumerate(seconds):
            axes.text(value, row, f" {value:.1f} s", va="center", color=INK)
        axes.set_xlabel("seconds (grey: reused from an earlier run)")
        axes.margins(x=0.15)
        return _svg(figure, "Time of each stage")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """SVG text without prolog; ink becomes ``currentColor`` so that it follows the page's theme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
