"""What this machine says of itself: real or emulated, how hot and how busy, and what this process has used.

Everything is read from ``/proc`` and ``/sys``; a file that is not there is simply not reported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

HARDWARE_VARIABLE = "KIRIDASHI_HARDWARE"
HOT_CELSIUS = 80.0
_THROTTLED = Path("sys/devices/platform/soc/soc:firmware/get_throttled")
_GOVERNOR = Path("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_MODALIAS = Path("sys/devices/system/cpu/modalias")
_ROOT = Path("/")


def hardware_kind(machine: str | None = None, root: Path = _ROOT) -> Literal["real", "emulated"]:
    """Whether timings are those of this processor.

    Under user-mode emulation the kernel below is another machine's: its own name for the processor
    (``cpu:type:x86,…``) does not fit what the program is told. ``KIRIDASHI_HARDWARE`` overrides.
    """
    told = os.environ.get(HARDWARE_VARIABLE)
    if told in ("real", "emulated"):
        return "emulated" if told == "emulated" else "real"
    seen = machine or os.uname().machine
    kernel = _read(root / _MODALIAS)
    if not kernel.startswith("cpu:type:"):
        return "real"
    family = kernel.removeprefix("cpu:type:").split(",", 1)[0].split(":", 1)[0]
    arm = seen.startswith(("aarch64", "arm"))
    return "emulated" if (family == "x86" and arm) or (family == "aarch64" and not arm) else "real"


def conditions(root: Path = _ROOT, processors: int | None = None) -> tuple[str, ...]:
    """What may have slowed a measurement: frequency governor, throttling, heat, other load."""
    notes = []
    governor = _read(root / _GOVERNOR)
    if governor and governor != "performance":
        notes.append(f"governor {governor}")
    throttled = _read(root / _THROTTLED)
    if throttled and int(throttled, 16):
        notes.append(f"throttled {throttled}")
    hottest = max((_celsius(path) for path in root.glob("sys/class/thermal/thermal_zone*/temp")), default=0.0)
    if hottest >= HOT_CELSIUS:
        notes.append(f"hot {hottest:.0f} C")
    load = float((_read(root / "proc/loadavg") or "0").split()[0])
    if load > 0.5 * (processors or os.cpu_count() or 1):
        notes.append(f"load {load:.1f}")
    return tuple(notes)


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had (``VmHWM``), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _celsius(path: Path) -> float:
    text = _read(path)
    return int(text) / 1000 if text.lstrip("-").isdigit() else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
