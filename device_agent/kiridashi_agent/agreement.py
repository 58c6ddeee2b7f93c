"""Do two measurements of one model agree, and if not, why not? Pure.

They agree when median, 95th percentile and peak memory are within 5 % of each other. Otherwise every cause that left a
trace is named, the one that explains most first; when nothing did, the difference is called unexplained.
"""

from __future__ import annotations

import msgspec
from kiridashi.budget import MIB, Conditions, Measurement

TOLERANCE = 0.05
_BUSY = 0.1
_STOLEN = 0.02
_CLOCK_CHANGE = 0.03
_WARMING_C = 5.0
_HOT_C = 80.0
_PREEMPTED_SHARE = 0.05


class Agreement(msgspec.Struct, frozen=True):
    """How far two measurements of one model are apart, as shares of the smaller one, and why if over 5 %."""

    p50: float
    p95: float
    memory: float
    within: bool
    reasons: tuple[str, ...] = ()


def agreement(first: Measurement, second: Measurement) -> Agreement:
    """Compare two measurements of the same file with the same settings."""
    p50 = _apart(first.latency_p50_ms, second.latency_p50_ms)
    p95 = _apart(first.latency_p95_ms, second.latency_p95_ms)
    memory = _apart(first.memory_bytes, second.memory_bytes)
    within = max(p50, p95, memory) <= TOLERANCE
    return Agreement(p50, p95, memory, within, () if within else _reasons(first, second, p50, p95, memory))


def _apart(first: float, second: float) -> float:
    return max(first, second) / min(first, second) - 1 if min(first, second) > 0 else 0.0


def _reasons(first: Measurement, second: Measurement, p50: float, p95: float, memory: float) -> tuple[str, ...]:
    slow, quick = sorted((first, second), key=lambda one: one.latency_p95_ms, reverse=True)
    reasons = []
    if slow.conditions is not None and quick.conditions is not None:
        reasons += _of_conditions(slow.conditions, quick.conditions)
        share = slow.conditions.preempted / max(slow.runs, 1)
        if share > _PREEMPTED_SHARE:
            reasons.append(
                f"the kernel interrupted the slower round {slow.conditions.preempted} times in {slow.runs} runs"
            )
    if memory > TOLERANCE:
        sizes = sorted((first.memory_bytes / MIB, second.memory_bytes / MIB))
        reasons.append(f"peak memory differs: {sizes[0]:.1f} and {sizes[1]:.1f} MiB; memory was allocated differently")
    pairs = ((p50, first.p50_ci_ms, second.p50_ci_ms), (p95, first.p95_ci_ms, second.p95_ci_ms))
    apart = [_overlap(one, other) for difference, one, other in pairs if difference > TOLERANCE]
    if apart and all(apart):
        runs = min(first.independent_runs, second.independent_runs)
        reasons.append(f"the intervals overlap: runs worth {runs} independent ones are too few to tell them apart")
    return tuple(reasons) or ("unexplained: nothing that the board reports changed between the rounds",)


def _of_conditions(slow: Conditions, quick: Conditions) -> list[str]:
    reasons = [f"throttled in the slower round: {word}" for word in slow.throttled]
    if slow.others is not None and quick.others is not None and max(slow.others, quick.others) > _BUSY:
        reasons.append(
            f"other processes kept {slow.others:.1f} of {slow.processors} processors busy in the slower round, "
            f"{quick.others:.1f} in the quicker"
        )
    if slow.stolen is not None and slow.stolen > _STOLEN:
        reasons.append(f"the hypervisor gave {slow.stolen:.2f} processors to other machines in the slower round")
    if slow.mhz is not None and quick.mhz is not None:
        clocks = (*slow.mhz, *quick.mhz)
        if max(clocks) > (1 + _CLOCK_CHANGE) * min(clocks):
            why = f" (governor {slow.governor})" if slow.governor and slow.governor != "performance" else ""
            reasons.append(f"the clock rate went between {min(clocks):.0f} and {max(clocks):.0f} MHz{why}")
    if slow.celsius is not None and quick.celsius is not None:
        degrees = (*slow.celsius, *quick.celsius)
        if max(degrees) >= _HOT_C or max(degrees) - min(degrees) > _WARMING_C:
            reasons.append(f"the board was between {min(degrees):.0f} and {max(degrees):.0f} °C")
    return reasons


def _overlap(first: tuple[float, float] | None, second: tuple[float, float] | None) -> bool:
    return first is not None and second is not None and first[0] <= second[1] and second[0] <= first[1]
