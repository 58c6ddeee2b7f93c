"""What does the line runtime cost, and does it lose frames?

``LineModel.predict`` beside the bare runtime; 500 predictions a second while models are changed over and rolled back;
the memory of a line process for every runtime and kind of file; the agent's resident process at rest. On a real cut:
EfficientNet-Lite0, half of every group. Exported bundles are kept under ``benchmark-results/runtime``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kiridashi.manifest import RUNTIME_OF_KIND, ArtifactKind, Manifest
from kiridashi.slots import Active, LineSlots

from benchmarks.idle_agent import idle_agent
from benchmarks.line_bundles import LINE, fill_slots, make_line_bundle
from benchmarks.line_overhead import median_ci, overhead_us
from benchmarks.line_swaps import Load, steady, swap_under_load
from benchmarks.report import Figure, Options, Report, parse_options, rounded, table

FOLDER = Path("benchmark-results/runtime")
FLOATS: tuple[ArtifactKind, ...] = ("onnx-fp32", "tflite-fp32")
KINDS: tuple[ArtifactKind, ...] = (*FLOATS, "onnx-int8", "tflite-fp16", "tflite-int8")
RATE_HZ = 500.0
OVERHEAD_GOAL_US = 20.0
IDLE_GOAL_BYTES = 40 * 1024 * 1024
_LOAD_PIXELS = 64


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables and figures, write the report; 1 if a goal is missed."""
    options = parse_options("runtime", "overhead, swaps under load, memory", arguments)
    torch.set_num_threads(1)
    report = Report("runtime", options)
    small = FOLDER / f"bundle-{_LOAD_PIXELS}-{options.seed}"
    make_line_bundle(_LOAD_PIXELS, FLOATS, small, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        slots, *manifests = fill_slots(small, Path(scratch, "state"))
        _overheads(report, slots, manifests[0], pairs=2000 if options.quick else 10_000)
        _swaps(report, slots, (manifests[0], manifests[1]), seconds=8.0 if options.quick else 60.0)
        _memory(report, options, Path(scratch))
        idle = idle_agent(small, LINE, Path(scratch, "plant"), seconds=10.0 if options.quick else 60.0)
    report.rows.append(rounded({"part": "idle", **vars(idle)}))
    report.figures["idle_rss_bytes"] = Figure(idle.rss_bytes, "bytes")
    report.figures["idle_cpu_share"] = Figure(idle.cpu_share, "share")
    report.print_figures()
    report.write()
    return 0 if _goals_met(report.figures) else 1


def _goals_met(figures: dict[str, Figure]) -> bool:
    overhead, lost, idle = (figures[name].value or 0 for name in ("predict_overhead_us", "swap.lost", "idle_rss_bytes"))
    return overhead <= OVERHEAD_GOAL_US and lost == 0 and idle <= IDLE_GOAL_BYTES


def _overheads(report: Report, slots: LineSlots, manifest: Manifest, pairs: int) -> None:
    rng = np.random.default_rng(report.options.seed)
    found: list[Figure] = []
    for kind in FLOATS:
        artifact = manifest.of_kind(kind)
        if artifact is None:
            raise ValueError(f"the bundle has no {kind}")
        differences = overhead_us(slots, manifest, artifact.name, pairs, rng)
        found.append(Figure(float(np.median(differences)), "us", median_ci(differences, rng)))
        report.figures[f"predict_overhead_us.{artifact.runtime}"] = found[-1]
        p10, p90 = np.percentile(differences, (10, 90))
        row = {"part": "overhead", "runtime": artifact.runtime, "pairs": pairs, "median_us": found[-1].value}
        report.rows.append(rounded({**row, "p10_us": float(p10), "p90_us": float(p90)}))
    report.figures["predict_overhead_us"] = max(found, key=lambda figure: figure.value or 0.0)


def _swaps(report: Report, slots: LineSlots, manifests: tuple[Manifest, Manifest], seconds: float) -> None:
    artifacts = [artifact.name for artifact in manifests[0].artifacts if artifact.kind in FLOATS]
    calm = steady(slots, manifests[0], artifacts[0], RATE_HZ, seconds / 2)
    load, changes = swap_under_load(slots, manifests, artifacts, RATE_HZ, seconds)
    for name, one in (("steady", calm), ("swapping", load)):
        report.rows.append(rounded({"part": "swap", "load": name, "rate_hz": RATE_HZ, **_load_row(one)}))
    report.figures["swap.lost"] = Figure(load.lost, "frames")
    report.figures["swap.frames"] = Figure(load.asked, "frames")
    report.figures["swap.changes"] = Figure(changes, "changes")
    report.figures["swap.answered_hz"] = Figure(_load_row(load)["answered_hz"], "1/s")
    for name, one in (("steady", calm), ("swap", load)):
        report.figures[f"{name}.p99_ms"] = Figure(float(np.percentile(one.latencies_ms, 99)), "ms")


def _load_row(load: Load) -> dict[str, Any]:
    p50, p99, most = np.percentile(load.latencies_ms, (50, 99, 100))
    return {
        "asked": load.asked,
        "answered_hz": (load.asked - load.refused - load.failed) / load.seconds,
        "refused": load.refused,
        "failed": load.failed,
        "wrong": load.wrong,
        "versions": load.versions,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "max_ms": float(most),
    }


def _memory(report: Report, options: Options, scratch: Path) -> None:
    pixels, kinds = (_LOAD_PIXELS, FLOATS) if options.quick else (224, KINDS)
    bundle = FOLDER / f"bundle-{pixels}-{options.seed}"
    manifest = make_line_bundle(pixels, kinds, bundle, options.seed)
    slots, first, _ = fill_slots(bundle, scratch / "memory")
    cells = []
    for artifact in manifest.artifacts:
        if artifact.kind not in RUNTIME_OF_KIND:
            continue
        slots.activate(Active(slot="a", artifact=artifact.name, model_digest=first.digest))
        seen = [_child(scratch / "memory") for _ in range(1 if options.quick else 3)]
        rss, peak = (int(np.median([row[key] for row in seen])) for key in ("rss", "peak"))
        name = f"{artifact.runtime}.{artifact.kind}"
        report.figures[f"rss_bytes.{name}"] = Figure(rss, "bytes")
        report.rows.append(
            {"part": "memory", "name": name, "pixels": pixels, "rss": rss, "peak": peak, **_how(seen[0])}
        )
        cells.append([name, f"{artifact.bytes / 2**20:.2f}", f"{rss / 2**20:.1f}", f"{peak / 2**20:.1f}"])
    print(table(["line process", "file MiB", "RSS MiB", "peak MiB"], cells))


def _how(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("runtime", "provider")}


def _child(state: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.line_child", str(state), LINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
