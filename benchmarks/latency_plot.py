"""Draw accuracy against latency, one line a method: ``python -m benchmarks.latency_plot --json IN --svg OUT``.

``IN`` is the report of ``python -m benchmarks.latency``. A point is the mean over tasks and seeds of the cuts that one
share of the dense latency was asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from kiridashi.artifacts import write_atomic

Point: TypeAlias = tuple[float, float]
_LABELS: Mapping[str, tuple[str, str]] = {
    "solved": ("solved under a latency limit", "#d62728"),
    "uniform": ("uniform ratio", "#1f77b4"),
    "uniform-8": ("uniform ratio, multiple of 8", "#7fb2d9"),
    "tp-taylor": ("torch-pruning, Taylor", "#2ca02c"),
    "tp-magnitude": ("torch-pruning, magnitude", "#98a72a"),
    "dense": ("dense", "#333333"),
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 400, 56, 44, 16
_RIGHT = 212


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the report, write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_plot", description=__doc__.partition(":")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="IN", help="the report of benchmarks.latency")
    parser.add_argument("--svg", type=Path, required=True, metavar="OUT", help="the picture")
    parsed = parser.parse_args(arguments)
    rows = [row for row in json.loads(parsed.json.read_bytes())["rows"] if row.get("part") == "speed"]
    write_atomic(parsed.svg, draw(rows).encode())
    return 0


def draw(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of :func:`benchmarks.latency_speed.measure_speed` as an SVG."""
    lines = mean_points(rows)
    points = [point for line in lines.values() for point in line]
    scale = _Scale(max(x for x, _ in points), max(y for _, y in points))
    body = [*scale.axes()]
    for place, (method, line) in enumerate(lines.items()):
        label, colour = _LABELS.get(method, (method, "#888888"))
        drawn = [scale.at(point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in drawn]
        x, y = _WIDTH - _RIGHT + 16, _TOP + 20 + 20 * place
        body.append(
            f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/><text x="{x + 10}" y="{y}">{escape(label)}</text>'
        )
    title = "Accuracy against latency of cuts, by method"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{title}">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def mean_points(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """By method, latency in milliseconds (geometric mean) and accuracy in % of each share, in the order of latency."""
    cells: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        cells.setdefault(row["method"], {}).setdefault(row["latency_share_asked"], []).append(row)
    return {
        method: sorted(
            (
                math.exp(sum(math.log(row["quiet_ms"]) for row in cell) / len(cell)),
                100 * sum(row["accuracy"] for row in cell) / len(cell),
            )
            for cell in shares.values()
        )
        for method, shares in cells.items()
    }


class _Scale:
    """From milliseconds and percent to pixels; both axes start at zero."""

    def __init__(self, most_ms: float, most_percent: float) -> None:
        self._step_ms = 10.0 ** math.floor(math.log10(most_ms)) / 2
        self._most_ms = self._step_ms * math.ceil(most_ms / self._step_ms)
        self._most_percent = 10 * math.ceil(most_percent / 10)

    def at(self, point: Point) -> Point:
        across = (_WIDTH - _LEFT - _RIGHT) * point[0] / self._most_ms
        up = (_HEIGHT - _TOP - _BOTTOM) * point[1] / self._most_percent
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    def axes(self) -> Iterable[str]:
        for percent in range(0, self._most_percent + 1, 10):
            (left, y), (right, _) = self.at((0, percent)), self.at((self._most_ms, percent))
            yield f'<line x1="{left:.0f}" y1="{y:.1f}" x2="{right:.0f}" y2="{y:.1f}" stroke="#ddd"/>'
            yield f'<text x="{left - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
        for step in range(round(self._most_ms / self._step_ms) + 1):
            x, y = self.at((step * self._step_ms, 0))
            yield f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y + 5:.1f}" stroke="#333"/>'
            yield f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{step * self._step_ms:g}</text>'
        x, y = self.at((self._most_ms / 2, 0))
        yield f'<text x="{x:.1f}" y="{y + 36:.1f}" text-anchor="middle">undisturbed latency, ms</text>'


if __name__ == "__main__":
    sys.exit(main())
