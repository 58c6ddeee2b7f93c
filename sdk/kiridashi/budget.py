"""Budgets (what a device may spend) and measurements (what a model was seen to spend)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from kiridashi.errors import BudgetError

MIB = 1024 * 1024
_SIZE_UNITS = {
    "b": 1,
    "kib": 1024,
    "mib": MIB,
    "gib": 1024 * MIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
_TIME_UNITS_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_QUANTITY = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zµ]*)\s*$", re.IGNORECASE)

Limit = Literal["memory", "file", "latency"]
_REPEATS = 4
CALM_TAIL = 3.0
"""A 95th percentile of more than this many medians is not the model's: every prediction does the same work."""


class Budget(msgspec.Struct, frozen=True):
    """Limits for one model on one device class; ``None`` means "no limit".

    Attributes:
        memory_bytes: peak resident memory of the process that serves the model, runtime included.
        file_bytes: size of the model file that the device runs.
        latency_p95_ms: 95th percentile of one prediction's wall time, batch 1, in milliseconds.
    """

    memory_bytes: int | None = None
    file_bytes: int | None = None
    latency_p95_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"memory=96MiB,file=4MiB,latency=5ms"``; every limit is optional.

        Raises:
            BudgetError: an unknown limit or unit, a limit given twice, or a value of zero.
        """
        values: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, sign, quantity = part.partition("=")
            name = name.strip()
            if not sign or name not in _FIELDS:
                raise _unreadable(text, f"'{part}' is not one of memory=…, file=…, latency=…")
            field, read = _FIELDS[name]
            if field in values:
                raise _unreadable(text, f"'{name}' is given twice")
            values[field] = read(text, quantity)
        return msgspec.convert(values, cls, strict=False)

    def __str__(self) -> str:
        parts = []
        if self.memory_bytes is not None:
            parts.append(f"memory={self.memory_bytes / MIB:.1f}MiB")
        if self.file_bytes is not None:
            parts.append(f"file={self.file_bytes / MIB:.2f}MiB")
        if self.latency_p95_ms is not None:
            parts.append(f"latency={self.latency_p95_ms:.3g}ms")
        return ",".join(parts) or "unlimited"


Range = tuple[float, float]


class Conditions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What surrounded a measurement while it ran; ``None`` or empty where the board does not tell.

    Attributes:
        seconds: how long the predictions were timed.
        processors: how many this machine has.
        others: processors that other processes kept busy, on average.
        stolen: processors that a hypervisor gave to other machines, on average.
        preempted: how often the kernel took the processor away from the measured process.
        governor: of the processor's frequency.
        mhz: mean frequency of the processors, before and after.
        celsius: the hottest place that the board reports, before and after.
        throttled: what slowed the processor down meanwhile, in words.
        throttled_earlier: what did since the board was started, in words.
        virtual: the hypervisor, if this is a virtual machine.
    """

    seconds: float
    processors: int
    others: float | None = None
    stolen: float | None = None
    preempted: int = 0
    governor: str = ""
    mhz: Range | None = None
    celsius: Range | None = None
    throttled: tuple[str, ...] = ()
    throttled_earlier: tuple[str, ...] = ()
    virtual: str = ""


class Measurement(msgspec.Struct, frozen=True):
    """What one model file was measured to need, in a fresh process of its own.

    ``memory_bytes`` is the process's peak resident set, runtime and interpreter included. Latencies are wall times of
    single predictions after warm-up; where other work disturbed them they are those of the quietest tenth of the runs,
    and ``notes`` says so. ``quiet_ms`` is one prediction without disturbance: with one thread the 10th percentile of
    its processor time, else of wall time; 0 where it is not known. ``memory_limit`` says how a limit was enforced:
    ``"cgroup"``, ``"rlimit"`` or ``"none"``.

    The fields from ``provider`` on are empty, 0 or ``None`` where the measurement is an older program's, or the board
    does not report them; nothing is estimated in their place.

    Attributes:
        provider: what computed the model, as the runtime says.
        timed: "line": preprocessing, runtime and softmax, as a line predicts; "model": the runtime's call alone.
        first_ms: the first prediction after loading.
        load_peak_bytes: peak resident set until the first prediction was done; an engine is built in that time.
        steady_bytes: resident set after the last prediction.
        p50_ci_ms, p95_ci_ms, p99_ci_ms: 95 % confidence intervals; ``None`` when the runs are too few for one.
        independent_runs: as many independent runs tell as much of the median as these runs, which depend on each other.
        gpu_bytes, gpu_load_peak_bytes: memory that the process held for the GPU at the end, and at most while loading.
        energy_mj, power_w: energy of one prediction and mean power, of everything on the rail that ``energy_of`` names.
        conditions: what surrounded the measurement.
    """

    memory_bytes: int
    file_bytes: int
    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    load_ms: float
    runs: int
    runtime: str
    threads: int
    hardware: Literal["real", "emulated"]
    memory_limit: Literal["cgroup", "rlimit", "none"] = "none"
    notes: tuple[str, ...] = ()
    quiet_ms: float = 0.0
    provider: str = ""
    timed: Literal["line", "model"] = "line"
    first_ms: float = 0.0
    load_peak_bytes: int = 0
    steady_bytes: int = 0
    p50_ci_ms: Range | None = None
    p95_ci_ms: Range | None = None
    p99_ci_ms: Range | None = None
    independent_runs: int = 0
    gpu_bytes: int | None = None
    gpu_load_peak_bytes: int | None = None
    energy_mj: float | None = None
    power_w: float | None = None
    energy_of: str = ""
    conditions: Conditions | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Whether a measurement stays inside a budget; ``exceeded`` names every limit that it breaks."""

    within: bool
    exceeded: tuple[Limit, ...] = ()

    def describe(self, budget: Budget, measured: Measurement) -> str:
        """One sentence with the numbers of the limits that are broken, or of all when none is."""
        facts: dict[Limit, str] = {
            "memory": f"memory {measured.memory_bytes / MIB:.1f} MiB of {_mib(budget.memory_bytes)}",
            "file": f"file {measured.file_bytes / MIB:.2f} MiB of {_mib(budget.file_bytes)}",
            "latency": f"p95 {measured.latency_p95_ms:.3g} ms of {_ms(budget.latency_p95_ms)}",
        }
        if self.within:
            return "inside the budget: " + ", ".join(facts.values())
        return "over the budget: " + ", ".join(facts[limit] for limit in self.exceeded)


def judge(budget: Budget, measured: Measurement) -> Verdict:
    """Compare a measurement with a budget; a limit is kept when measured <= limit."""
    pairs: tuple[tuple[Limit, float | None, float], ...] = (
        ("memory", budget.memory_bytes, measured.memory_bytes),
        ("file", budget.file_bytes, measured.file_bytes),
        ("latency", budget.latency_p95_ms, measured.latency_p95_ms),
    )
    exceeded = tuple(name for name, limit, value in pairs if limit is not None and value > limit)
    return Verdict(within=not exceeded, exceeded=exceeded)


def measure_against(budget: Budget, measure: Callable[[], Measurement]) -> Measurement:
    """Measure once, and up to four times more while only disturbance can be what puts the latency over the limit.

    When the undisturbed time is inside the latency limit and the 95th percentile is not, something else may have used
    the machine. Disturbance only ever adds time, so the measurement with the lowest 95th percentile counts, and its
    notes say how many there were. Memory, file size and an undisturbed time over the limit are not measured again.
    """
    measured = [measure()]
    while len(measured) <= _REPEATS and _may_be_disturbed(budget, measured[-1]):
        measured.append(measure())
    best = min(measured, key=lambda one: one.latency_p95_ms)
    if len(measured) == 1:
        return best
    return msgspec.structs.replace(best, notes=(*best.notes, f"the quietest of {len(measured)} measurements"))


def _may_be_disturbed(budget: Budget, measured: Measurement) -> bool:
    limit = budget.latency_p95_ms
    undisturbed_ms = measured.quiet_ms or measured.latency_p50_ms
    return judge(budget, measured).exceeded == ("latency",) and limit is not None and undisturbed_ms <= limit


def _read_quantity(text: str, quantity: str, units: dict[str, float]) -> float:
    match = _QUANTITY.match(quantity)
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in units:
        raise _unreadable(text, f"'{quantity}' needs a number and one of {', '.join(filter(None, units))}")
    value = float(match.group(1)) * units[unit]
    if value <= 0:
        raise _unreadable(text, "a limit must be above zero")
    return value


def _read_size(text: str, quantity: str) -> float:
    return int(_read_quantity(text, quantity, dict(_SIZE_UNITS)))


def _read_time(text: str, quantity: str) -> float:
    return _read_quantity(text, quantity, _TIME_UNITS_MS)


_FIELDS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "memory": ("memory_bytes", _read_size),
    "file": ("file_bytes", _read_size),
    "latency": ("latency_p95_ms", _read_time),
}


def _unreadable(text: str, why: str) -> BudgetError:
    return BudgetError(
        f"the budget '{text}' cannot be read",
        why=why,
        next_step="write it like memory=96MiB,file=4MiB,latency=5ms",
    )


def _mib(limit: int | None) -> str:
    return "no limit" if limit is None else f"{limit / MIB:.2f} MiB"


def _ms(limit: float | None) -> str:
    return "no limit" if limit is None else f"{limit:.3g} ms"
