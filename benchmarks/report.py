"""The one format in which benchmarks speak: rows are the raw results, figures the summary."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kiridashi import __version__
from kiridashi.artifacts import write_atomic

_LIBRARIES = ("torch", "onnxruntime", "ai-edge-litert", "numpy", "transformers", "torch-pruning")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the summary.

    Attributes:
        value: the number; None when nothing was measured for it.
        unit: what it counts, such as ``"share"``, ``"ratio"``, ``"points"`` or ``"ms"``.
        ci95: its 95 % confidence interval, where there is one.
    """

    value: float | int | None
    unit: str
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark is called with."""

    json: Path | None
    quick: bool
    seed: int


def options_parser(name: str, question: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks share, for those that add to it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write rows and figures to this file")
    parser.add_argument("--quick", action="store_true", help="a smaller run of the same measurements")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything that is random")
    return parser


def parse_options(name: str, question: str, arguments: Sequence[str] | None = None) -> Options:
    """Read the command line that all benchmarks share."""
    parsed = options_parser(name, question).parse_args(arguments)
    return Options(parsed.json, parsed.quick, parsed.seed)


@dataclass
class Report:
    """Rows and figures of one run; make it before measuring, for the time it took."""

    benchmark: str
    options: Options
    hardware: Literal["real", "emulated"] = "real"
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    _clock: float = field(default_factory=time.monotonic, repr=False)

    def write(self) -> None:
        """Write the JSON file, whole or not at all, if one was asked for."""
        if self.options.json is None:
            return
        content = {
            "benchmark": self.benchmark,
            "version": __version__,
            "quick": self.options.quick,
            "seed": self.options.seed,
            "hardware": self.hardware,
            "machine": machine(),
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 1),
            "rows": self.rows,
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
        }
        write_atomic(self.options.json, json.dumps(content, indent=1, allow_nan=False).encode())

    def print_figures(self) -> None:
        """Print the summary, one figure a line."""
        width = max(map(len, self.figures), default=0)
        for name, figure in self.figures.items():
            interval = "" if figure.ci95 is None else f"  [{figure.ci95[0]:.4g}, {figure.ci95[1]:.4g}]"
            print(f"{name:<{width}}  {'-' if figure.value is None else f'{figure.value:.4g}'} {figure.unit}{interval}")


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, system, versions."""
    versions: dict[str, str] = {}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in [header, *rows])
    )


def show(value: Any, form: str = "") -> str:
    """A cell of a table: a number in its form, a dash for nothing, yes and no."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return format(value, form)


def rounded(values: Mapping[str, Any], digits: int = 6) -> dict[str, Any]:
    """Floats shortened for the file; everything else as it is."""
    return {key: float(f"{value:.{digits}g}") if isinstance(value, float) else value for key, value in values.items()}
