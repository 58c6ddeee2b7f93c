"""What the drift watch costs: on the line for every frame and every sample, and in the agent's child for every look."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import MANIFEST_NAME, describe_file
from kiridashi.budget import Budget
from kiridashi.drift.rows import Row, RowFile, RowFolder, shortened
from kiridashi.drift.sampler import Sampler
from kiridashi.drift.statistics import NAMES, frame_statistics
from kiridashi.manifest import Manifest, Preprocessing
from kiridashi.slots import Active, LineSlots
from kiridashi_agent.child import Call
from kiridashi_agent.jobs import WatchRequest, watch

# A small parent of its own: a child's peak memory begins with its parent's.
_PARENT = """
import resource, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "kiridashi_agent.child", "watch"], stdin=-1, stdout=-1)
child.stdin.write(sys.argv[1].encode() + b"\\n")
child.stdin.flush()
child.stdout.read()
if child.wait():
    sys.exit("the child failed")
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""
LINE, LABELS = "press-3", tuple(f"class-{n}" for n in range(8))
FRAMES_PER_S, SAMPLE_S, LOOK_S = 30.0, 2.0, 600.0


@dataclass(frozen=True)
class CostOptions:
    """``repeats`` of each timing."""

    seed: int
    repeats: int


@dataclass(frozen=True)
class Cost:
    """Medians. ``us_per_frame`` is a line of 30 frames a second of 224 pixels, sampled every 2 s; all threads.

    ``look_cpu_s`` is the processor time of a child that takes the samples of 10 minutes, start and imports included.
    """

    us_per_frame: float
    offer_us: float
    sample_us_64: float
    sample_us_224: float
    sample_us_1080p: float
    look_cpu_s: float
    look_peak_mib: float


def measure_costs(options: CostOptions) -> Cost:
    """Measure."""
    rng = np.random.default_rng(options.seed)
    values = rng.dirichlet(np.ones(len(LABELS))).astype(np.float32)
    sampled = {}
    for name, height, width, side in (("64", 64, 64, 64), ("224", 224, 224, 224), ("1080p", 1080, 1920, 224)):
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        once = _noting(frame, values, side)
        sampled[name] = _median_us(once, max(20, options.repeats // (20 if name == "1080p" else 2)))
    with tempfile.TemporaryDirectory() as scratch:
        sampler = Sampler(RowFolder(Path(scratch), LINE), 3600.0, 3600.0, 0)
        frame = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        sampler.offer(frame, values, "digest", (224, 224))
        offer = _median_us(lambda: sampler.offer(frame, values, "digest", (224, 224)), 10 * options.repeats)
        sampler.close()
        cpu_s, peak = _look(Path(scratch), rng)
    per_frame = offer + sampled["224"] / (FRAMES_PER_S * SAMPLE_S)
    return Cost(per_frame, offer, sampled["64"], sampled["224"], sampled["1080p"], cpu_s, peak)


def _noting(frame: np.ndarray, values: np.ndarray, side: int) -> Callable[[], object]:  # type: ignore[type-arg]
    """What the thread does with a sample, the copy included."""
    return lambda: shortened(Row(0.0, 0, tuple(frame_statistics(frame.copy(), values.copy(), (side, side)).tolist())))


def _median_us(once: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        before = time.perf_counter_ns()
        once()
        times.append((time.perf_counter_ns() - before) / 1e3)
    return float(np.median(times))


def _look(state: Path, rng: np.random.Generator) -> tuple[float, float]:
    """Processor seconds and peak MiB of a child in a watch that has learnt, with 10 minutes of samples waiting."""
    digest = _activate(state)
    folder = RowFolder(state, LINE)
    for _ in range(4):
        _write(folder, digest, rng, 150)
    request = WatchRequest(str(state), {LINE: 400})
    outcome = watch(request)
    if outcome.lines[LINE].phase != "watching":
        raise RuntimeError(f"the watch is not as far as it should be: {outcome}")
    _write(folder, digest, rng, int(LOOK_S / SAMPLE_S))
    call = msgspec.json.encode(Call(msgspec.Raw(msgspec.json.encode(request))))
    done = subprocess.run([sys.executable, "-c", _PARENT, call.decode()], capture_output=True, timeout=120, check=True)
    cpu_s, peak_kib = done.stdout.split()
    return float(cpu_s), float(peak_kib) / 1024


def _write(folder: RowFolder, digest: str, rng: np.random.Generator, count: int) -> None:
    numbers = rng.normal(size=(count, len(NAMES)))
    rows = tuple(shortened(Row(time.time(), int(rng.integers(8)), tuple(row.tolist()))) for row in numbers)
    folder.add(RowFile(digest, NAMES, rows))


def _activate(state: Path) -> str:
    """A slot whose model nobody runs: the watch reads its manifest only."""
    slots = LineSlots(state, LINE)
    slot = slots.prepare("a")
    (slot / "model.onnx").write_bytes(b"nothing")
    manifest = Manifest(
        line=LINE,
        version=1,
        task="none",
        labels=LABELS,
        backbone="none",
        backbone_fingerprint="none",
        layout_digest="none",
        plan_digest="none",
        parameters_dense=1,
        parameters_kept=1,
        preprocessing=Preprocessing(224, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        budget=Budget(),
        artifacts=(describe_file(slot / "model.onnx", "onnx-fp32"),),
    )
    (slot / MANIFEST_NAME).write_bytes(manifest.encode())
    slots.activate(Active("a", "model.onnx", manifest.digest))
    return manifest.digest
