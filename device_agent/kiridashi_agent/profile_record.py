"""The record of a profile in the making: what has been measured of a probe set, and what is to be measured next.

A graph is measured once alone, in a process of its own, and in :data:`SITTINGS` sittings: processes in which it takes
turns with other graphs. After each of these the record is written, so a run that was ended goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.budget import CALM_TAIL
from kiridashi.errors import StateError
from kiridashi.probes import ProbeReport, Timing

from kiridashi_agent.jobs import TURN

FORMAT = "kiridashi-profile-record/1"
SITTINGS = 2
"""Two processes differ in where their memory lies; that difference belongs to the noise that is reported."""

_FEWEST_ROUNDS = 10
_START_FACTOR = 2.0
"""A process that starts more slowly than others before must still end in time: one that is killed gives nothing."""


class Key(msgspec.Struct, frozen=True):
    """What a record is of; measurements with another key cannot be put together with its own."""

    probes: str
    device_class: str
    runtime: str
    threads: int
    hardware: Literal["real", "emulated"]


class Alone(msgspec.Struct, frozen=True):
    """One graph in a process of its own; ``start_s`` is what the process took beside loading and predicting.

    The other fields are those of :class:`~kiridashi.probes.Timing`; ``p99_ms`` and ``runs`` are 0 in an older record.
    """

    p50_ms: float
    p95_ms: float
    memory_bytes: int
    load_ms: float
    start_s: float
    p99_ms: float = 0.0
    runs: int = 0


class Sitting(msgspec.Struct, frozen=True):
    """Quiet times, in milliseconds, of graphs that took turns in one process, and the runs of each."""

    quiet_ms: dict[str, float]
    runs: int


class Record(msgspec.Struct, frozen=True):
    """Everything measured so far; ``seconds`` is the time spent, ``notes`` what may have disturbed it."""

    key: Key
    format: str = FORMAT
    alone: dict[str, Alone] = {}
    sittings: tuple[Sitting, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def sat(self, name: str) -> int:
        """In how many sittings a graph has been."""
        return sum(name in sitting.quiet_ms for sitting in self.sittings)

    def steps(self, name: str) -> int:
        """How much of a graph is done, of ``1 + SITTINGS``."""
        return (name in self.alone) + min(self.sat(name), SITTINGS)


@dataclass(frozen=True)
class Plan:
    """The next sitting: its graphs, the dense model first, and the seconds that it may take once it has started."""

    graphs: tuple[str, ...]
    seconds: float


def open_record(path: Path, key: Key) -> Record:
    """The record at ``path`` if it is of ``key``, else a new one; what is there otherwise is renamed, never lost.

    Raises:
        StateError: it is no file, or may not be read.
    """
    if not path.exists():
        return Record(key)
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise StateError(f"the record {path} cannot be read", why=str(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        why = f"it cannot be read: {error}"
    else:
        if record.format == FORMAT and record.key == key:
            return record
        why = _difference(record, key)
    place = next(aside for n in count(1) if not (aside := path.with_name(f"{path.name}.{n}")).exists())
    path.rename(place)
    return Record(key, notes=(f"measured anew; an earlier record is now {place.name}: {why}",))


def save_record(path: Path, record: Record) -> None:
    """Write the record so that after a crash the old or the new one stands."""
    write_atomic(path, msgspec.json.encode(record))


def next_sitting(record: Record, file_bytes: Mapping[str, int], memory_bytes: float, seconds: float) -> Plan | None:
    """The graphs that sit together next, as many as fit the memory and the time; ``None`` if the time is too short.

    Args:
        record: every graph has been measured alone.
        file_bytes: size of each graph's file, in the set's order.
        memory_bytes: what the process may use; infinite if there is no limit.
        seconds: what is left for all sittings.
    """
    anchor, *others = file_bytes
    left = {name: SITTINGS - record.sat(name) for name in others or [anchor]}
    waiting = [name for name in others if left[name] == max(left.values())]
    starts = sorted(alone.start_s for alone in record.alone.values())
    start = _START_FACTOR * starts[len(starts) // 2]
    batch, need = [anchor], start + _least_s(record.alone[anchor])
    process, growth = _growth(record, file_bytes)
    used = process + growth[anchor]
    for name in waiting:
        more = _least_s(record.alone[name])
        if len(batch) > 1 and (need + more > seconds or used + growth[name] > memory_bytes):
            break
        batch.append(name)
        used += growth[name]
        need += more
    if need > seconds:
        return None
    cost = {name: record.alone[name].p50_ms for name in left}
    share = sum(cost[name] for name in batch if name in left) / sum(cost[name] * left[name] for name in left)
    return Plan(tuple(batch), max(need, share * seconds) - start)


def to_report(record: Record, names: tuple[str, ...]) -> ProbeReport:
    """What the record says of the graphs that are done; complete when all are."""
    done = [name for name in names if record.steps(name) == 1 + SITTINGS]
    return ProbeReport(
        probes=record.key.probes,
        device_class=record.key.device_class,
        runtime=record.key.runtime,
        threads=record.key.threads,
        hardware=record.key.hardware,
        timings=tuple(_timing(record, name, names[0]) for name in done),
        seconds=record.seconds,
        complete=len(done) == len(names),
        notes=record.notes + _restless(record),
    )


def _restless(record: Record) -> tuple[str, ...]:
    restless = sum(alone.p95_ms > CALM_TAIL * alone.p50_ms for alone in record.alone.values())
    if not restless:
        return ()
    return (f"other work disturbed {restless} of {len(record.alone)} graphs alone: p95 over {CALM_TAIL:g} medians",)


def _timing(record: Record, name: str, anchor: str) -> Timing:
    """Disturbance only adds time, so the quieter sitting counts; the dense model has been in all of them."""
    sittings = [sitting for sitting in record.sittings if name in sitting.quiet_ms]
    quietest = min(sittings, key=lambda sitting: sitting.quiet_ms[name])
    times = [sitting.quiet_ms[name] for sitting in sittings]
    middle = len(times) // 2
    alone = record.alone[name]
    return Timing(
        name=name,
        quiet_ms=quietest.quiet_ms[name],
        halves_ms=(min(times[:middle]), min(times[middle:])),
        anchor_ms=quietest.quiet_ms[anchor],
        runs=sum(sitting.runs for sitting in sittings),
        p50_ms=alone.p50_ms,
        p95_ms=alone.p95_ms,
        memory_bytes=alone.memory_bytes,
        load_ms=alone.load_ms,
        p99_ms=alone.p99_ms,
        alone_runs=alone.runs,
    )


def _growth(record: Record, file_bytes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Bytes of a process without a model, and what each graph adds to it.

    A model takes at least its file's size, so the smallest peak less that size is the most that the process has.
    """
    process = min(record.alone[name].memory_bytes - size for name, size in file_bytes.items())
    return process, {name: record.alone[name].memory_bytes - process for name in file_bytes}


def _least_s(alone: Alone) -> float:
    """Time that a graph needs in a sitting at least: loading, warming up, and the fewest rounds that are worth it."""
    return (alone.load_ms + (1 + _FEWEST_ROUNDS) * TURN * alone.p50_ms) / 1e3


def _difference(record: Record, key: Key) -> str:
    fields = {"probes": "probe set", "device_class": "device class", "hardware": "kind of hardware"}
    other = [
        f"{fields.get(name, name)} ({getattr(record.key, name)})"
        for name in key.__struct_fields__
        if getattr(record.key, name) != getattr(key, name)
    ]
    return f"it is of another {', '.join(other) or f'format ({record.format})'}"
