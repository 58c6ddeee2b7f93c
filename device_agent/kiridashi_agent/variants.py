"""Which size of the train step this device can afford: the largest by memory, then the largest by time. Pure.

Memory is estimated before anything is loaded, time is known only from iterations that ran here: the largest size that
fits the memory is tried, and when it is too slow its pace says which smaller one would be quick enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kiridashi.budget import MIB
from kiridashi.manifest import TrainSpec, TrainVariant
from kiridashi.messages import VariantCost

HEAD = "head"
ALLOCATOR = 1.5
"""What the runtime's allocator keeps, over what is alive at the same time."""
RUNTIME_BYTES = 20 * MIB
"""The runtime's own memory for one session."""
_MACS_PER_BYTE = 4
"""Multiply-accumulates in the time in which a processor reads or writes a byte of a large tensor."""


def variants_of(spec: TrainSpec) -> tuple[TrainVariant, ...]:
    """The sizes that a bundle has, smallest first; an older bundle has one of unknown cost."""
    only = TrainVariant("biases", spec.graph, spec.parameters, spec.learning_rate, 0, 0, 0)
    return spec.variants or (only,)


@dataclass
class Choice:
    """The sizes of a bundle while one is being chosen; ``notes`` say what became of each.

    Args:
        variants: smallest first.
        resident_bytes: what the process uses before it loads one.
        limit_bytes: what it may use.
        iterations: how many are wanted.
        skip: names of those that went over the memory limit before.
    """

    variants: Sequence[TrainVariant]
    resident_bytes: int
    limit_bytes: int
    iterations: int
    skip: Sequence[str] = ()
    notes: dict[str, str] = field(default_factory=dict)
    paces_s: dict[str, float] = field(default_factory=dict)

    def fitting(self) -> list[TrainVariant]:
        """Those that fit the memory, largest first; the others are noted."""
        found = []
        for variant in reversed(self.variants):
            if variant.name in self.skip:
                self.notes[variant.name] = "went over the memory limit"
            elif self.peak_bytes(variant) > self.limit_bytes:
                self.notes[variant.name] = f"needs more than the {self.limit_bytes / MIB:.0f} MiB that are left"
            else:
                found.append(variant)
        return found

    def peak_bytes(self, variant: TrainVariant) -> int:
        """The estimated peak of the whole process."""
        return self.resident_bytes + RUNTIME_BYTES + int(ALLOCATOR * variant.peak_bytes)

    def seconds(self, variant: TrainVariant) -> float:
        """The time of all iterations: from its own pace, else from the pace of the size nearest in work, else 0."""
        if variant.name in self.paces_s:
            return self.iterations * self.paces_s[variant.name]
        known = [other for other in self.variants if other.name in self.paces_s and work(other)]
        if not known:
            return 0.0
        nearest = min(known, key=lambda other: abs(work(other) - work(variant)))
        return self.iterations * self.paces_s[nearest.name] * work(variant) / work(nearest)

    def costs(self) -> tuple[VariantCost, ...]:
        """What the report says of each."""
        return tuple(
            VariantCost(one.name, self.peak_bytes(one), self.seconds(one), self.notes.get(one.name, "not needed"))
            for one in self.variants
        )


def work(variant: TrainVariant) -> int:
    """What an iteration does, in multiply-accumulates, memory traffic counted as the time that it takes."""
    return variant.macs + _MACS_PER_BYTE * variant.moved_bytes
