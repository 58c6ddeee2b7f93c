"""The watch over one line as one state: learn what the line looks like, then hold every new frame against it.

Two references are watched at once. *line*: the first frames since the model became active, taken to be healthy;
it says that something changed. *server*: the samples that the model was made on; it says that the line does not look
like them. Both use frames thinned by the same stride, and each may raise a false alarm, ever, with probability at most
half of ``alpha``, of which one half goes to limits that are too low and one to evidence by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from kiridashi.drift.events import Event, EventSet, make_events, occurrences
from kiridashi.drift.evidence import Evidence, no_evidence, taken
from kiridashi.drift.report import Finding, LineDrift, ReferenceName
from kiridashi.drift.rows import Row
from kiridashi.drift.statistics import NAMES
from kiridashi.drift.thinning import stride

ALPHA = 0.01
REFERENCE_FRAMES = 400
MIN_REFERENCE_FRAMES = 20
RECENT = 256
_LEARNING_LIMIT = 5
_PIECE = 64
_replace = msgspec.structs.replace
Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]


class Held(msgspec.Struct, frozen=True):
    """A reference's events and the evidence against them."""

    events: EventSet
    evidence: Evidence


class WatchState(msgspec.Struct, frozen=True):
    """All that the watch knows of a line; made by :func:`new_watch`, moved on by :func:`advanced`.

    Attributes:
        digest, labels: the active model and its classes.
        wanted: frames that the line's own reference takes.
        alpha: the probability of a false alarm, ever.
        server: rows of the server's samples, until learning ends.
        tuned: the model was tuned here: the server does not know its outputs, and is asked about images only.
        sampled: rows seen so far.
        base: while learning, one row of so many is kept.
        learning: these rows, and ``learnt`` how many of them are far enough apart, as last counted.
        stride: one row of so many is used, 0 while learning.
        held: the references that are watched.
        recent: the last rows that were used.
        findings: what was found.
    """

    digest: str
    labels: tuple[str, ...]
    wanted: int = REFERENCE_FRAMES
    alpha: float = ALPHA
    server: tuple[Row, ...] = ()
    tuned: bool = False
    sampled: int = 0
    base: int = 1
    learning: tuple[Row, ...] = ()
    learnt: int = 0
    stride: int = 0
    held: dict[ReferenceName, Held] = {}
    recent: tuple[Row, ...] = ()
    findings: tuple[Finding, ...] = ()


def new_watch(
    digest: str, labels: Sequence[str], server: Sequence[Row], wanted: int = REFERENCE_FRAMES, *, tuned: bool = False
) -> WatchState:
    """The beginning of a watch over a model; ``server`` are rows of samples that are independent of each other."""
    return WatchState(digest, tuple(labels), wanted, server=tuple(server), tuned=tuned)


def advanced(state: WatchState, rows: Iterable[Row]) -> WatchState:
    """The state after more sampled rows, in the order of time; what was found anew is at the end of its findings."""
    waiting = list(rows)
    while waiting and not state.stride:
        piece, waiting = waiting[:_PIECE], waiting[_PIECE:]
        state = _learnt(state, piece)
    if not waiting:
        return state
    first = -state.sampled % state.stride
    used = waiting[first :: state.stride]
    state = _replace(state, sampled=state.sampled + len(waiting))
    return _watched(state, used, tuple(state.held))


def summary(state: WatchState) -> LineDrift:
    """What is told of the state."""
    return LineDrift(
        phase="watching" if state.stride else "learning",
        model_digest=state.digest,
        learnt=min(state.learnt, state.wanted),
        wanted=state.wanted,
        stride=state.stride,
        sampled=state.sampled,
        findings=state.findings,
    )


def shows(state: WatchState, finding: Finding, row: Row) -> bool:
    """Whether a frame shows the change that was found."""
    events = state.held[finding.reference].events
    one = tuple(e for e in events.events if (e.name, e.change) == (finding.statistic, finding.change))
    return bool(occurrences(_replace(events, events=one), *arrays([row])).any())


def arrays(rows: Sequence[Row]) -> Arrays:
    """Statistics float64 [n, len(NAMES)] and best classes int64 [n]."""
    values = np.array([row.values for row in rows], np.float64).reshape(len(rows), len(NAMES))
    return values, np.array([row.best for row in rows], np.int64)


def _learnt(state: WatchState, rows: Sequence[Row]) -> WatchState:
    """Keep every ``base``-th row; end learning once enough of them are far enough apart."""
    kept = [*state.learning, *rows[-state.sampled % state.base :: state.base]]
    base, has_grown = state.base, len(kept) // _PIECE != len(state.learning) // _PIECE
    while len(kept) > _LEARNING_LIMIT * state.wanted:
        kept, base = kept[::2], 2 * base
    state = _replace(state, sampled=state.sampled + len(rows), base=base, learning=tuple(kept))
    if not has_grown:
        return state
    lag = stride(*arrays(kept))
    reference = kept[::lag]
    state = _replace(state, learnt=len(reference))
    return state if state.learnt < state.wanted else _begun(state, reference, lag * base)


def _begun(state: WatchState, reference: Sequence[Row], step: int) -> WatchState:
    """Watch from here on; what was learnt is at once held against the server's samples."""
    delta = state.alpha / 4
    held: dict[ReferenceName, Held] = {"line": _held(make_events(*arrays(reference), state.labels, delta))}
    if len(state.server) >= MIN_REFERENCE_FRAMES:
        events = make_events(*arrays(state.server), state.labels, delta)
        asked = tuple(event for event in events.events if event.signal == "image" or not state.tuned)
        held["server"] = _held(_replace(events, events=asked))
    state = _replace(state, held=held, stride=step, learning=(), server=())
    return _watched(state, reference, tuple(name for name in held if name == "server"))


def _held(events: EventSet) -> Held:
    return Held(events, no_evidence(len(events.events)))


def _watched(state: WatchState, rows: Sequence[Row], names: Sequence[ReferenceName]) -> WatchState:
    if not rows:
        return state
    values, best = arrays(rows)
    held = dict(state.held)
    for name in names:
        events = held[name].events
        limits = np.array([event.limit for event in events.events])
        held[name] = Held(events, taken(held[name].evidence, occurrences(events, values, best), limits))
    state = _replace(state, held=held, recent=(*state.recent, *rows)[-RECENT:])
    for name in names:
        state = _replace(state, findings=(*state.findings, *_found(state, name)))
    return state


def _found(state: WatchState, name: ReferenceName) -> list[Finding]:
    """The strongest event of every signal that has not been reported yet and is beyond the threshold."""
    events, evidence = state.held[name].events.events, state.held[name].evidence
    threshold = math.log(len(events) / (state.alpha / 4)) if events else math.inf
    known = {finding.signal for finding in state.findings if finding.reference == name}
    strongest: dict[str, int] = {}
    for n in sorted(range(len(events)), key=lambda n: evidence.highest[n]):
        if evidence.highest[n] >= threshold and events[n].signal not in known:
            strongest[events[n].signal] = n
    return [_finding(state, name, n) for n in strongest.values()]


def _finding(state: WatchState, name: ReferenceName, number: int) -> Finding:
    held = state.held[name]
    event, evidence = held.events.events[number], held.evidence
    since = max(1, evidence.frames - evidence.starts[number])
    rows = state.recent[-since:]
    values, best = arrays(rows)
    shown = occurrences(msgspec.structs.replace(held.events, events=(event,)), values, best)
    before, now = _before_and_now(held.events, event, values, best)
    return Finding(
        reference=name,
        signal=event.signal,
        statistic=event.name,
        change=event.change,
        p_value=min(1.0, len(held.events.events) * math.exp(-min(evidence.highest[number], 600.0))),
        limit=event.limit,
        share=float(shown.mean()),
        before=before,
        now=now,
        frames=since,
        tested=evidence.frames,
        since_s=rows[0].at_s,
        at_s=rows[-1].at_s,
    )


def _before_and_now(
    events: EventSet, event: Event, values: NDArray[np.float64], best: NDArray[np.int64]
) -> tuple[float, float]:
    if event.column is not None:
        return events.medians[event.column], float(np.median(values[:, event.column]))
    if event.best in events.named:
        return events.shares[events.named.index(event.best)], float((best == event.best).mean())
    return 1.0 - sum(events.shares), float((~np.isin(best, events.named)).mean())
