"""Profiling: measuring a probe set on this device, within a time, in steps that are kept.

This module is part of the resident agent: everything that needs a runtime is done by child processes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from kiridashi.artifacts import check_file
from kiridashi.errors import BundleError, RuntimeUnavailableError
from kiridashi.probes import PROBE_SET_NAME, ProbeReport, ProbeSet, decode_probe_set
from kiridashi.runtime import RUNTIMES, available_runtimes

from kiridashi_agent import jobs
from kiridashi_agent.machine import available_bytes, device_class, hardware_kind
from kiridashi_agent.process import JobTimeoutError, Limits, MemoryLimitError
from kiridashi_agent.profile_record import (
    SITTINGS,
    Alone,
    Key,
    Plan,
    Record,
    Sitting,
    next_sitting,
    open_record,
    save_record,
    to_report,
)

_ALONE_SHARE = 0.35
_ALONE_S = (0.3, 2.0)
_START_S = 1.0
"""Guess of what a child takes beside predicting, until the first one has been seen."""
_FEWEST_RUNS = 20


@dataclass(frozen=True)
class ProfileSettings:
    """How a probe set is measured.

    Attributes:
        threads: inside one prediction.
        seconds: what one call may take.
        memory_bytes: what a child may use; by default half of what is available.
        device_class: another name than this device's own.
    """

    threads: int = 1
    seconds: float = 600.0
    memory_bytes: int | None = None
    device_class: str | None = None


@dataclass(frozen=True)
class _Work:
    """What all steps of one call share; ``deadline`` is in seconds of the monotonic clock."""

    folder: Path
    file_bytes: Mapping[str, int]
    threads: int
    memory_bytes: int | None
    alone_s: float
    deadline: float
    cancel: threading.Event | None

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def limits(self, expected_s: float) -> Limits:
        """The time that is left, unless a child that takes so much longer than expected must be hanging."""
        return Limits(min(self.left_s(), jobs.MEASURE_LIMITS.seconds + expected_s), self.memory_bytes, self.cancel)


def measure_probes(
    folder: Path,
    record: Path,
    settings: ProfileSettings,
    *,
    cancel: threading.Event | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> ProbeReport:
    """Measure a probe set as far as the time allows, going on where ``record`` stands.

    Every step is kept in ``record`` when it is done. When the time is up the report is not ``complete``, and the next
    call goes on, if there was time for one step at least; a finished record is reported without measuring. A record of
    another probe set, device class, runtime or number of threads is renamed, and the report's notes say so.

    Args:
        folder: the probe set's file and its model files.
        record: a JSON file of this function's own.
        settings: threads, time and memory.
        cancel: stops the child and this call when it is set.
        tell: is called with the steps done and those of the whole profile.

    Raises:
        BundleError: no probe set, or a damaged file; nothing has been measured then.
        RuntimeUnavailableError: the set's runtime is not installed.
        StateError: the record cannot be read.
        JobError: a child crashed, hung, reached its memory limit, or was cancelled, or the time is too short for one
            step; what was measured before is kept.
    """
    begun = time.monotonic()
    probes = _read(folder)
    names = tuple(graph.artifact.name for graph in probes.graphs)
    kept = open_record(record, _key(probes, settings))
    total = len(names) * (1 + SITTINGS)
    if _steps(kept, names) == total:
        return to_report(kept, names)
    for graph in probes.graphs:
        check_file(folder / graph.artifact.name, graph.artifact)
    work = _prepare(folder, probes, kept, settings, begun, cancel)
    tell = tell or (lambda _done, _total: None)
    start = kept
    tell(_steps(kept, names), total)
    while _steps(kept, names) < total and (step := _step(work, kept)) is not None:
        kept = msgspec.structs.replace(step, seconds=start.seconds + time.monotonic() - begun)
        save_record(record, kept)
        tell(_steps(kept, names), total)
    if kept is start:
        raise JobTimeoutError(
            f"{settings.seconds:g} s are too short for one more measurement of '{probes.name}'",
            next_step="allow it more seconds; what was measured before is kept",
        )
    return to_report(kept, names)


def _step(work: _Work, kept: Record) -> Record | None:
    """The record after one more measurement; ``None`` if the time is up."""
    missing = next((name for name in work.file_bytes if name not in kept.alone), None)
    try:
        if missing is not None:
            return _measure_alone(work, kept, missing) if work.left_s() > 0 else None
        plan = next_sitting(kept, work.file_bytes, work.memory_bytes or math.inf, work.left_s())
        return _sit(work, kept, plan) if plan is not None else None
    except JobTimeoutError:
        if work.left_s() > 0:
            raise
        return None
    except MemoryLimitError as error:
        step = "stop other programs on this device, or make a probe set of a smaller backbone"
        raise MemoryLimitError(error.what, why=error.why, next_step=step) from error


def _measure_alone(work: _Work, kept: Record, name: str) -> Record:
    path = str(work.folder / name)
    request = jobs.MeasureRequest(folder=path, threads=work.threads, runs=_FEWEST_RUNS, seconds=work.alone_s)
    begun = time.monotonic()
    measured = jobs.measure(request, work.limits(work.alone_s))
    predicting_s = (measured.runs * measured.latency_p50_ms + measured.load_ms) / 1e3
    alone = Alone(
        p50_ms=measured.latency_p50_ms,
        p95_ms=measured.latency_p95_ms,
        memory_bytes=measured.memory_bytes,
        load_ms=measured.load_ms,
        start_s=max(0.0, time.monotonic() - begun - predicting_s),
        p99_ms=measured.latency_p99_ms,
        runs=measured.runs,
    )
    return msgspec.structs.replace(kept, alone=kept.alone | {name: alone})


def _sit(work: _Work, kept: Record, plan: Plan) -> Record:
    request = jobs.InterleaveRequest(
        folder=str(work.folder),
        graphs=plan.graphs,
        threads=work.threads,
        seconds=plan.seconds,
        seed=len(kept.sittings),
    )
    done = jobs.interleave(request, work.limits(2 * plan.seconds))
    sitting = Sitting(quiet_ms=done.quiet_ms, runs=done.rounds * request.turn)
    notes = tuple(dict.fromkeys(kept.notes + done.notes))
    return msgspec.structs.replace(kept, sittings=(*kept.sittings, sitting), notes=notes)


def _steps(kept: Record, names: tuple[str, ...]) -> int:
    return sum(kept.steps(name) for name in names)


def _prepare(
    folder: Path,
    probes: ProbeSet,
    kept: Record,
    settings: ProfileSettings,
    begun: float,
    cancel: threading.Event | None,
) -> _Work:
    """Share out time and memory before anything is measured."""
    file_bytes = {graph.artifact.name: graph.artifact.bytes for graph in probes.graphs}
    missing = len(file_bytes) - len(kept.alone)
    each_s = _ALONE_SHARE * settings.seconds / missing - _START_S if missing else 0.0
    return _Work(
        folder=folder,
        file_bytes=file_bytes,
        threads=settings.threads,
        memory_bytes=settings.memory_bytes or available_bytes() // 2 or None,
        alone_s=min(max(each_s, _ALONE_S[0]), _ALONE_S[1]),
        deadline=begun + settings.seconds,
        cancel=cancel,
    )


def _read(folder: Path) -> ProbeSet:
    path = folder / PROBE_SET_NAME
    if not path.is_file():
        raise BundleError(f"{folder} is not a probe set", why=f"it has no {PROBE_SET_NAME}")
    return decode_probe_set(path.read_bytes(), str(path))


def _key(probes: ProbeSet, settings: ProfileSettings) -> Key:
    runtime = available_runtimes().get(probes.runtime)
    if runtime is None:
        raise RuntimeUnavailableError(
            f"the probe set '{probes.name}' needs the runtime '{probes.runtime}', which is not installed",
            next_step=f"pip install 'kiridashi[{RUNTIMES[probes.runtime].extra}]'",
        )
    return Key(
        probes=probes.digest,
        device_class=settings.device_class or device_class(),
        runtime=runtime,
        threads=settings.threads,
        hardware=hardware_kind(),
    )
