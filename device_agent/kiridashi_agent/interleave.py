"""Interleaving: the times of several model files, measured so that they can be compared with each other.

A machine's speed drifts, with heat and with what else runs. So all models are loaded into one process and take turns:
in every round each has one, in a freshly shuffled order. A line's process runs one model over and over, and its caches
and branch predictors hold that model. So a turn is several predictions in a row, and the quickest counts: the first
ones of a turn take up to twice as long. Disturbance only adds time, so of a model's turns the quickest quarter counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kiridashi_agent.jobs import Interleaved, InterleaveRequest
from kiridashi_agent.machine import conditions
from kiridashi_agent.ratios import ratios
from kiridashi_agent.subject import open_plain

Request = InterleaveRequest
QUIET_SHARE = 0.25
_FEWEST_ROUNDS = 2


def run(request: InterleaveRequest) -> Interleaved:
    """Load all models, warm each up with one turn, then let them take turns until the time is up.

    Raises:
        BundleError, InputError: a file cannot be used.
        RuntimeUnavailableError: the runtime is not installed.
    """
    deadline = time.perf_counter() + request.seconds
    notes = conditions()
    turns = [_turn(Path(request.folder) / name, request) for name in request.graphs]
    for turn in turns:
        turn()
    times_ms = take_turns(turns, request, deadline)
    quiet_ms = dict(zip(request.graphs, quiet_times(times_ms).tolist(), strict=True))
    compared = ratios(times_ms, np.random.default_rng(request.seed)) if request.compare else ()
    return Interleaved(quiet_ms=quiet_ms, rounds=len(times_ms), notes=notes, ratios=compared)


def quiet_times(times_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each model's quickest quarter of turns, at least one, from times [rounds, models]."""
    quickest = np.sort(times_ms, axis=0)[: max(1, round(QUIET_SHARE * len(times_ms)))]
    means: NDArray[np.float64] = quickest.mean(axis=0)
    return means


def take_turns(
    turns: Sequence[Callable[[], float]],
    request: InterleaveRequest,
    deadline: float,
    clock: Callable[[], float] = time.perf_counter,
) -> NDArray[np.float64]:
    """Milliseconds of every turn, float64 [rounds, turns]; each round has its own order.

    Ends after ``request.max_rounds``, or when the clock is at ``deadline`` and two rounds are done; a round that is cut
    short by that is left out.
    """
    rng = np.random.default_rng(request.seed)
    rounds: list[list[float]] = []
    while len(rounds) < request.max_rounds:
        row = [0.0] * len(turns)
        for n in rng.permutation(len(turns)):
            if clock() > deadline and len(rounds) >= _FEWEST_ROUNDS:
                return np.array(rounds)
            row[n] = turns[n]()
        rounds.append(row)
    return np.array(rounds)


def _turn(path: Path, request: InterleaveRequest) -> Callable[[], float]:
    """Load a model; the result runs it ``request.turn`` times in a row and gives the quickest, milliseconds.

    With one thread the runtimes compute in the calling thread, and its processor time leaves out the moments in which
    others had the processor. With more threads, or on a GPU, only wall time covers all of it.
    """
    subject = open_plain(path, request)
    clock = time.thread_time_ns if request.threads == 1 and subject.in_thread else time.perf_counter_ns

    def once(n: int) -> int:
        before = clock()
        subject.once(n)
        return clock() - before

    return lambda: min(once(n) for n in range(request.turn)) / 1e6
