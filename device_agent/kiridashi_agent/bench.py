"""Measuring model files and comparing them: rounds of fresh processes, then sittings in which they take turns.

In the second round the files come in the opposite order, so that what drifts with time falls on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kiridashi.artifacts import sha256_file
from kiridashi.budget import Budget, Measurement, judge
from kiridashi.errors import BundleError
from kiridashi.runtime.protocol import PREFERENCE, Provider

from kiridashi_agent.agreement import agreement
from kiridashi_agent.bench_report import Compared, Comparison, Earlier, FileReport
from kiridashi_agent.history import Entry, last_like
from kiridashi_agent.jobs import Interleaved, InterleaveRequest, MeasureRequest, Shape
from kiridashi_agent.machine import hardware_kind
from kiridashi_agent.process import JobError, Limits

SITTINGS = 3
"""Two processes with the same files differ by where their memory lies; a difference has to show in all of them."""
_START_S = 600.0
"""What loading may take; building an engine for a GPU takes minutes."""
_LONGEST_FACTOR = 21.0
_MAX_RUNS = 20_000


class Measuring(Protocol):
    """The child processes; the module :mod:`kiridashi_agent.jobs` is one."""

    def measure(self, request: MeasureRequest, limits: Limits) -> Measurement:
        """Measure one file."""
        ...

    def interleave(self, request: InterleaveRequest, limits: Limits) -> Interleaved:
        """Time files against each other."""
        ...


@dataclass(frozen=True)
class BenchSettings:
    """How files are measured.

    Attributes:
        threads: inside one prediction.
        providers: what may compute a model, best first.
        shapes: of inputs, by name; the name may be empty.
        bare: time the runtime's call alone, whatever the model is.
        seconds: how long predictions are timed in each process.
        rounds: processes for each file.
        memory_bytes: what a process may use; ``None`` for no limit.
    """

    threads: int = 1
    providers: tuple[Provider, ...] = PREFERENCE
    shapes: tuple[tuple[str, Shape], ...] = ()
    bare: bool = False
    seconds: float = 2.0
    rounds: int = 2
    memory_bytes: int | None = None


def measure_files(
    files: Sequence[Path],
    settings: BenchSettings,
    budget: Budget,
    history: Sequence[Entry],
    jobs: Measuring,
    tell: Callable[[str], None],
) -> tuple[FileReport, ...]:
    """Measure every file in ``settings.rounds`` processes, and hold the rounds against each other.

    Raises:
        InputError, BundleError, RuntimeUnavailableError: a file cannot be used.
        JobError: a process crashed, hung or reached its memory limit.
    """
    limits = Limits(_START_S + _LONGEST_FACTOR * settings.seconds, settings.memory_bytes)
    rounds: dict[Path, list[Measurement]] = {path: [] for path in files}
    for n in range(settings.rounds):
        for path in files if n % 2 == 0 else reversed(files):
            tell(f"round {n + 1} of {settings.rounds}: {path}")
            request = MeasureRequest(
                folder=str(path),
                threads=settings.threads,
                providers=settings.providers,
                shapes=dict(settings.shapes),
                bare=settings.bare,
                seconds=settings.seconds,
                max_runs=_MAX_RUNS,
            )
            rounds[path].append(jobs.measure(request, limits))
    return tuple(_reported(path, rounds[path], budget, history) for path in files)


def _reported(path: Path, rounds: Sequence[Measurement], budget: Budget, history: Sequence[Entry]) -> FileReport:
    best, digest = min(rounds, key=lambda one: one.latency_p50_ms), sha256_file(path)
    before = last_like(history, digest, best)
    return FileReport(
        file=str(path),
        sha256=digest,
        measured=best,
        rounds=tuple(rounds),
        verdict=judge(budget, best),
        agreement=agreement(rounds[0], rounds[1]) if len(rounds) > 1 else None,
        earlier=None if before is None else _since(before, best),
    )


def _since(before: Entry, now: Measurement) -> Earlier:
    p50 = before.measured.latency_p50_ms
    return Earlier(before.at, p50, now.latency_p50_ms / p50 - 1)


def compare_files(
    files: Sequence[Path], settings: BenchSettings, jobs: Measuring, tell: Callable[[str], None]
) -> Comparison:
    """Time the files against the first one, all in one process, in several sittings.

    When they cannot be loaded together, the comparison has a note instead of rows.
    """
    seconds = settings.seconds * len(files)
    sittings: list[Interleaved] = []
    try:
        for n in range(SITTINGS):
            tell(f"comparing: {n + 1} of {SITTINGS}")
            request = InterleaveRequest(
                folder="",
                graphs=tuple(str(path) for path in files),
                threads=settings.threads,
                providers=settings.providers,
                shapes=dict(settings.shapes),
                bare=settings.bare,
                compare=True,
                seconds=seconds,
                seed=n,
            )
            sittings.append(jobs.interleave(request, Limits(_START_S + 2 * seconds, settings.memory_bytes)))
    except (JobError, BundleError) as error:
        # What a child wrote to standard error stays out of the report: it may name folders.
        note = f"the files could not be compared in one process: {error.what}"
        return Comparison(str(files[0]), 0, 0, hardware_kind(), notes=(note,))
    return summed_up([str(path) for path in files], sittings)


def summed_up(files: Sequence[str], sittings: Sequence[Interleaved]) -> Comparison:
    """What all sittings say together: the middle ratio, and an interval that covers every sitting's."""
    rows = []
    for n, file in enumerate(files[1:]):
        ratios = [sitting.ratios[n] for sitting in sittings]
        low, high = min(ratio.low for ratio in ratios), max(ratio.high for ratio in ratios)
        middle = math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios))
        rows.append(Compared(file, middle, low, high, real=not low <= 1 <= high))
    rounds = sum(sitting.rounds for sitting in sittings)
    return Comparison(files[0], len(sittings), rounds, hardware_kind(), tuple(rows), sittings[-1].notes)
