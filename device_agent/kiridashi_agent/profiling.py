"""Measuring a probe set (placeholder: the signature that the device side provides)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kiridashi.errors import RuntimeUnavailableError
from kiridashi.probes import ProbeReport


@dataclass(frozen=True)
class ProfileSettings:
    """How to measure: threads inside one prediction, seconds, a limit of memory, and another name of the class."""

    threads: int = 1
    seconds: float = 600.0
    memory_bytes: int | None = None
    device_class: str | None = None


def measure_probes(
    folder: Path,
    record: Path,
    settings: ProfileSettings,
    *,
    cancel: threading.Event | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> ProbeReport:
    """Measure the probe set in ``folder``, going on from ``record``."""
    raise RuntimeUnavailableError(f"{folder} cannot be measured", why=str((record, settings, cancel, tell)))
