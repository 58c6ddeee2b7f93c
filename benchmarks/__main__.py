"""Run every benchmark: ``python -m benchmarks [--quick] [--out DIR]``."""

from __future__ import annotations

import argparse
import pkgutil
import subprocess
import sys
from pathlib import Path

import benchmarks

SHARED = frozenset(
    {
        *("drift_cost", "drift_world", "idle_agent", "line_bundles", "line_child", "line_overhead", "line_swaps"),
        *("__main__", "cells", "equal_accuracy", "exports", "global_pruning", "knapsacks", "latency_budgets"),
        *(
            "latency_cuts",
            "latency_models",
            "latency_plot",
            "latency_speed",
            "layer_sums",
            "oneshot_tasks",
            "report",
            "settings_lines",
            "settings_poison",
            "torch_pruning",
            "trainstep_accuracy",
            "trainstep_child",
            "trainstep_costs",
            "trainstep_subject",
            "zoo",
        ),
    }
)


def main() -> int:
    """Run the benchmarks one after another, each as a process of its own; returns the number that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR", help="one JSON file each")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name not in SHARED)
    failed = 0
    for name in names:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(arguments.out / f"{name}.json")]
        failed += subprocess.run([*command, *(["--quick"] if arguments.quick else [])], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
