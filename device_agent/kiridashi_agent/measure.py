"""Measuring: what one model file needs on this device, in a process that does nothing else.

A prediction is timed as the line application does it: preprocessing of a frame that has the model's size, the runtime,
and the softmax. Peak memory is the process's own ``VmHWM``: interpreter, numpy, runtime and model together, which is
what a line process with this model costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from kiridashi.artifacts import check_file
from kiridashi.budget import CALM_TAIL, Measurement
from kiridashi.errors import InputError
from kiridashi.manifest import Preprocessing
from kiridashi.preprocess import softmax, to_input
from kiridashi.runtime import open_file, open_model
from kiridashi.runtime.protocol import LoadedModel
from numpy.typing import NDArray

from kiridashi_agent.jobs import MeasureRequest
from kiridashi_agent.machine import conditions, hardware_kind, peak_rss_bytes
from kiridashi_agent.probe import read_manifest

Request = MeasureRequest
_HARD_STOP_FACTOR = 20.0
_FEWEST_RUNS = 20
_FRAMES = 8
_PERCENTILES = (50, 95, 99)
_WINDOWS = 10
_QUIET_PERCENTILE = 10


def run(request: MeasureRequest) -> Measurement:
    """Load, warm up, time single predictions, and read the peak memory.

    Raises:
        BundleError, InputError: the artifact or file cannot be used.
        RuntimeUnavailableError: its runtime is not installed.
    """
    notes = conditions()
    path = Path(request.folder) / request.artifact if request.artifact else Path(request.folder)
    started = time.perf_counter()
    model, preprocessing = _open(request, path) if request.artifact else open_plain(path, request.threads)
    load_ms = (time.perf_counter() - started) * 1e3
    frames = random_frames(preprocessing)
    busy_ms: list[float] = []

    def once(n: int) -> None:
        before = time.thread_time_ns()
        predict(model, preprocessing, frames[n % len(frames)])
        busy_ms.append((time.thread_time_ns() - before) / 1e6)

    latencies_ms = time_runs(once, request)
    (p50, p95, p99), disturbance = settled_percentiles(latencies_ms)
    notes += disturbance
    if model.provider in ("tensorrt", "cuda"):
        notes += (f"computed by {model.provider}",)
    if len(latencies_ms) < request.runs:
        notes += (f"only {len(latencies_ms)} runs: the model is slow",)
    return Measurement(
        memory_bytes=peak_rss_bytes(),
        file_bytes=path.stat().st_size,
        latency_p50_ms=float(p50),
        latency_p95_ms=float(p95),
        latency_p99_ms=float(p99),
        load_ms=load_ms,
        runs=len(latencies_ms),
        runtime=model.runtime,
        threads=request.threads,
        hardware=hardware_kind(),
        memory_limit=request.memory_limit,
        notes=notes,
        # Only with one thread does the calling thread do all the work.
        quiet_ms=float(np.percentile(busy_ms if request.threads == 1 else latencies_ms, _QUIET_PERCENTILE)),
    )


def settled_percentiles(latencies_ms: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[str, ...]]:
    """The 50th, 95th and 99th percentile, and a note when other work disturbed the runs.

    A tail of more than three times the median is not the model's: a prediction does the same work every time. Then the
    runs are taken as ten consecutive windows, the one with the lowest 95th percentile counts, and the note has the
    95th percentile over all runs. Fewer than 200 runs are too few for windows and are taken as they are.
    """
    p50, p95, p99 = (float(value) for value in np.percentile(latencies_ms, _PERCENTILES))
    if p95 <= CALM_TAIL * p50 or len(latencies_ms) < _WINDOWS * _FEWEST_RUNS:
        return (p50, p95, p99), ()
    windows = [np.percentile(window, _PERCENTILES) for window in np.array_split(latencies_ms, _WINDOWS)]
    p50, quietest, p99 = (float(value) for value in min(windows, key=lambda percentiles: percentiles[1]))
    note = f"disturbed by other work: percentiles of the quietest tenth, p95 over all runs {p95:.3g} ms"
    return (p50, quietest, p99), (note,)


def time_runs(
    predict: Callable[[int], object], request: MeasureRequest, clock: Callable[[], float] = time.perf_counter
) -> NDArray[np.float64]:
    """Wall time of single predictions after warm-up, milliseconds.

    At least ``request.runs`` are timed, then on until ``request.seconds`` have passed or ``request.max_runs`` are
    done. A model too slow for that is given up on after twenty times ``request.seconds``, with no fewer than 20 runs.
    """
    started = clock()
    for n in range(request.warmup):
        predict(n)
        if clock() - started > request.seconds:
            break
    times: list[float] = []
    begun = clock()
    while len(times) < request.max_runs:
        before = clock()
        predict(len(times))
        after = clock()
        times.append((after - before) * 1e3)
        passed = after - begun
        if passed > request.seconds and len(times) >= request.runs:
            break
        if passed > _HARD_STOP_FACTOR * request.seconds and len(times) >= _FEWEST_RUNS:
            break
    return np.array(times)


def _open(request: MeasureRequest, path: Path) -> tuple[LoadedModel, Preprocessing]:
    manifest = read_manifest(Path(request.folder))
    artifact = manifest.artifact(request.artifact)
    check_file(path, artifact)
    return open_model(path, artifact, request.threads, manifest.artifacts), manifest.preprocessing


def open_plain(path: Path, threads: int) -> tuple[LoadedModel, Preprocessing]:
    """Open a model file that has no manifest, with a preprocessing of the model's own size.

    Raises:
        InputError: the file is missing or of an unknown kind, or the size of its input is open.
        RuntimeUnavailableError, BundleError: as :func:`kiridashi.runtime.open_file`.
    """
    model = open_file(path, threads)
    height, width = model.frame_shape
    if 0 in (height, width):
        raise InputError(
            f"{path} leaves the size of its input open", next_step="export it with a fixed height and width"
        )
    return model, Preprocessing(height=height, width=width, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def random_frames(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A few frames of the model's size, uint8 [N, H, W, 3], always the same ones."""
    shape = (_FRAMES, preprocessing.height, preprocessing.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def predict(model: LoadedModel, preprocessing: Preprocessing, frame: NDArray[np.uint8]) -> None:
    """One prediction as the line application makes it, of a uint8 frame [H, W, 3]."""
    softmax(model.run(to_input(frame[None], preprocessing, model.layout)))
