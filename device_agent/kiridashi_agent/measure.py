"""Measuring: what one model file needs on this device, in a process that does nothing else.

A prediction is timed as the line application does it: preprocessing of a frame that has the model's size, the runtime,
and the softmax. A file that is no classifier of images is timed by itself. Peak memory is the process's own ``VmHWM``:
interpreter, numpy, runtime and model together, which is what a line process with this model costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kiridashi.budget import CALM_TAIL, Conditions, Measurement
from numpy.typing import NDArray

from kiridashi_agent.board import between, look
from kiridashi_agent.gpu_memory import GpuPeak, gpu_bytes
from kiridashi_agent.jobs import MeasureRequest
from kiridashi_agent.machine import conditions, hardware_kind, peak_rss_bytes, resident_bytes
from kiridashi_agent.power import Meter, find_meter
from kiridashi_agent.quantiles import independent_runs, quantile_interval
from kiridashi_agent.subject import Subject, open_artifact, open_plain

Request = MeasureRequest
_HARD_STOP_FACTOR = 20.0
_FEWEST_RUNS = 20
_LEVELS = (0.5, 0.95, 0.99)
_WINDOWS = 10
_QUIET_PERCENTILE = 10


@dataclass(frozen=True)
class _Loaded:
    """A model after its first prediction, and what that took."""

    subject: Subject
    load_ms: float
    first_ms: float
    peak_bytes: int
    gpu_peak_bytes: int | None


@dataclass(frozen=True)
class _Timed:
    """The predictions after warm-up: wall times, processor times of the calling thread, and what surrounded them.

    ``peak_bytes`` and ``steady_bytes`` are the process's memory, before anything is worked out from the times.
    """

    latencies_ms: NDArray[np.float64]
    busy_ms: NDArray[np.float64]
    conditions: Conditions
    meter: Meter | None
    peak_bytes: int
    steady_bytes: int


def run(request: MeasureRequest) -> Measurement:
    """Load, predict once, warm up, time single predictions, and read the memory.

    Raises:
        BundleError, InputError: the artifact or file cannot be used.
        RuntimeUnavailableError: its runtime is not installed, or none of the providers is here.
    """
    notes = conditions()
    path = Path(request.folder) / request.artifact if request.artifact else Path(request.folder)
    loaded = _load(request, path)
    warm_up(loaded.subject.once, request)
    timed = _time(loaded.subject, request)
    settled, disturbance = settled_runs(timed.latencies_ms)
    p50, p95, p99 = (float(value) for value in np.quantile(settled, _LEVELS))
    p50_ci, p95_ci, p99_ci = (quantile_interval(settled, level) for level in _LEVELS)
    in_thread = request.threads == 1 and loaded.subject.in_thread
    joules = timed.meter.joules() if timed.meter else None
    return Measurement(
        memory_bytes=timed.peak_bytes,
        file_bytes=path.stat().st_size,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        load_ms=loaded.load_ms,
        runs=len(timed.latencies_ms),
        runtime=loaded.subject.runtime,
        threads=request.threads,
        hardware=hardware_kind(),
        memory_limit=request.memory_limit,
        notes=notes + disturbance + _notes(request, loaded, len(timed.latencies_ms), p50, p95),
        quiet_ms=float(np.percentile(timed.busy_ms if in_thread else timed.latencies_ms, _QUIET_PERCENTILE)),
        provider=loaded.subject.provider,
        timed=loaded.subject.timed,
        first_ms=loaded.first_ms,
        load_peak_bytes=loaded.peak_bytes,
        steady_bytes=timed.steady_bytes,
        p50_ci_ms=p50_ci,
        p95_ci_ms=p95_ci,
        p99_ci_ms=p99_ci,
        independent_runs=independent_runs(settled),
        gpu_bytes=gpu_bytes(),
        gpu_load_peak_bytes=loaded.gpu_peak_bytes,
        energy_mj=None if joules is None else joules * 1e3 / len(timed.latencies_ms),
        power_w=None if joules is None or timed.meter is None else joules / timed.meter.seconds(),
        energy_of="" if joules is None or timed.meter is None else timed.meter.source,
        conditions=timed.conditions,
    )


def _load(request: MeasureRequest, path: Path) -> _Loaded:
    with GpuPeak() as gpu:
        started = time.perf_counter()
        subject = open_artifact(path.parent, path.name, request) if request.artifact else open_plain(path, request)
        loaded = time.perf_counter()
        subject.once(0)
        predicted = time.perf_counter()
    return _Loaded(subject, (loaded - started) * 1e3, (predicted - loaded) * 1e3, peak_rss_bytes(), gpu.bytes)


def _time(subject: Subject, request: MeasureRequest) -> _Timed:
    busy_ms: list[float] = []

    def once(n: int) -> None:
        before = time.thread_time_ns()
        subject.once(n)
        busy_ms.append((time.thread_time_ns() - before) / 1e6)

    before = look()
    meter = find_meter(time.perf_counter())
    latencies_ms = time_runs(once, request, between=meter.look if meter else None)
    if meter is not None:
        meter.look(time.perf_counter(), at_once=True)
    peak_bytes, steady_bytes = peak_rss_bytes(), resident_bytes()
    return _Timed(latencies_ms, np.array(busy_ms), between(before, look()), meter, peak_bytes, steady_bytes)


def _notes(request: MeasureRequest, loaded: _Loaded, runs: int, p50: float, p95: float) -> tuple[str, ...]:
    notes = []
    if not loaded.subject.in_thread:
        notes.append(f"computed by {loaded.subject.provider}")
        if loaded.gpu_peak_bytes is None:
            notes.append("the GPU's memory is not reported here, or only to root")
    if request.memory_limit == "rlimit":
        notes.append("this kernel does not limit the memory of a group of processes: resource limits were used")
    if p95 > CALM_TAIL * p50:
        notes.append(f"the tail is other work's: p95 is {p95 / p50:.0f} times the median")
    if runs < request.runs:
        notes.append(f"only {runs} runs: the model is slow")
    return tuple(notes)


def settled_runs(latencies_ms: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The runs whose quantiles count, and a note when other work disturbed some of them.

    A tail of more than three times the median is not the model's: a prediction does the same work every time. Then the
    runs are taken as ten consecutive windows, the one with the lowest 95th percentile counts, and the note has the
    95th percentile over all runs. Fewer than 200 runs are too few for windows and are taken as they are.
    """
    p50, p95 = (float(value) for value in np.quantile(latencies_ms, _LEVELS[:2]))
    if p95 <= CALM_TAIL * p50 or len(latencies_ms) < _WINDOWS * _FEWEST_RUNS:
        return latencies_ms, ()
    quietest = min(np.array_split(latencies_ms, _WINDOWS), key=lambda window: float(np.quantile(window, _LEVELS[1])))
    return quietest, (f"disturbed by other work: percentiles of the quietest tenth, p95 over all runs {p95:.3g} ms",)


def warm_up(
    predict: Callable[[int], object], request: MeasureRequest, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Predict ``request.warmup`` times, or until ``request.seconds`` have passed."""
    started = clock()
    for n in range(request.warmup):
        predict(n)
        if clock() - started > request.seconds:
            break


def time_runs(
    predict: Callable[[int], object],
    request: MeasureRequest,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[float], object] | None = None,
) -> NDArray[np.float64]:
    """Wall time of single predictions, milliseconds.

    At least ``request.runs`` are timed, then on until ``request.seconds`` have passed or ``request.max_runs`` are
    done. A model too slow for that is given up on after twenty times ``request.seconds``, with no fewer than 20 runs.
    ``between`` is called with the clock after each of them; what it does is not timed.
    """
    times: list[float] = []
    begun = clock()
    while len(times) < request.max_runs:
        before = clock()
        predict(len(times))
        after = clock()
        times.append((after - before) * 1e3)
        if between is not None:
            between(after)
        passed = after - begun
        if passed > request.seconds and len(times) >= request.runs:
            break
        if passed > _HARD_STOP_FACTOR * request.seconds and len(times) >= _FEWEST_RUNS:
            break
    return np.array(times)
