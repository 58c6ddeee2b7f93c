"""What a board tells of itself while something is measured: clock, heat, throttling, and who else used the processor.

Everything is read from ``/proc`` and ``/sys`` and, on a Raspberry Pi without the file, from ``vcgencmd``. What is not
there is not reported.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kiridashi.budget import Conditions

from kiridashi_agent.machine import virtual_machine

_ROOT = Path("/")
_CPUS = "sys/devices/system/cpu"
_PI_FLAGS = Path("sys/devices/platform/soc/soc:firmware/get_throttled")
# The bits of the firmware's answer to get_throttled; 16 places higher stands what has been so since the start.
_PI_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_START = 16
_PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")
_POSSIBLE_CELSIUS = (-40.0, 150.0)
_VCGENCMD_TIMEOUT_S = 2.0
_STAT_STEAL = 7
_STAT_IDLE = (3, 4)


@dataclass(frozen=True)
class Moment:
    """The board at one moment. Times and counts are since some start, so only differences mean anything.

    Attributes:
        seconds: of the monotonic clock.
        busy_s, stolen_s: of all processors together; ``None`` where the kernel does not tell.
        own_s: processor time of this process.
        preempted: involuntary context switches of this process.
        mhz, celsius: see :class:`~kiridashi.budget.Conditions`.
        pi_flags: the Raspberry Pi firmware's bits.
        capped: thermal limits in force, by name, in words.
        counts: throttling events by name.
    """

    seconds: float
    busy_s: float | None = None
    stolen_s: float | None = None
    own_s: float = 0.0
    preempted: int = 0
    mhz: float | None = None
    celsius: float | None = None
    pi_flags: int = 0
    capped: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


def look(root: Path = _ROOT, vcgencmd: Callable[[], str] | None = None) -> Moment:
    """The board now.

    Args:
        root: under which ``/proc`` and ``/sys`` are.
        vcgencmd: gives the answer of ``vcgencmd get_throttled``; by default the program is asked, if it is there.
    """
    busy_s, stolen_s = _processor_seconds(root)
    return Moment(
        seconds=time.monotonic(),
        busy_s=busy_s,
        stolen_s=stolen_s,
        own_s=time.process_time(),
        preempted=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
        mhz=_mhz(root),
        celsius=_celsius(root),
        pi_flags=_pi_flags(root, vcgencmd or _ask_vcgencmd),
        capped=_capped(root),
        counts=_throttle_counts(root),
    )


def between(before: Moment, after: Moment, root: Path = _ROOT) -> Conditions:
    """What surrounded the time from one moment to the other. Pure but for the governor's and the hypervisor's name."""
    seconds = max(after.seconds - before.seconds, 1e-9)
    others = stolen = None
    if before.busy_s is not None and after.busy_s is not None:
        others = max(0.0, after.busy_s - before.busy_s - (after.own_s - before.own_s)) / seconds
    if before.stolen_s is not None and after.stolen_s is not None:
        stolen = max(0.0, after.stolen_s - before.stolen_s) / seconds
    return Conditions(
        seconds=seconds,
        processors=os.cpu_count() or 1,
        others=others,
        stolen=stolen,
        preempted=after.preempted - before.preempted,
        governor=read(root / _CPUS / "cpu0/cpufreq/scaling_governor"),
        mhz=None if before.mhz is None or after.mhz is None else (before.mhz, after.mhz),
        celsius=None if before.celsius is None or after.celsius is None else (before.celsius, after.celsius),
        throttled=_throttled(before, after),
        throttled_earlier=tuple(word for bit, word in _PI_BITS.items() if before.pi_flags >> (bit + _SINCE_START) & 1),
        virtual=virtual_machine(root),
    )


def _throttled(before: Moment, after: Moment) -> tuple[str, ...]:
    during = before.pi_flags | after.pi_flags | (after.pi_flags & ~before.pi_flags) >> _SINCE_START
    words = [word for bit, word in _PI_BITS.items() if during >> bit & 1]
    words += {**before.capped, **after.capped}.values()
    for name, count in after.counts.items():
        more = count - before.counts.get(name, count)
        if more > 0:
            words.append(f"{name} {more} times")
    return tuple(words)


def _processor_seconds(root: Path) -> tuple[float | None, float | None]:
    """Busy and stolen time of all processors, from the first line of ``/proc/stat`` (proc(5))."""
    fields = read(root / "proc/stat").split("\n", 1)[0].split()
    if len(fields) <= _STAT_STEAL + 1 or fields[0] != "cpu":
        return None, None
    ticks = [int(text) for text in fields[1:]]
    hertz = os.sysconf("SC_CLK_TCK")
    # Guests' time is part of user time already, so what follows the stolen time is left out.
    busy = sum(ticks[:_STAT_STEAL]) - sum(ticks[n] for n in _STAT_IDLE)
    return busy / hertz, ticks[_STAT_STEAL] / hertz


def _mhz(root: Path) -> float | None:
    khz = [whole(path) for path in sorted((root / _CPUS).glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))]
    known = [value / 1000 for value in khz if value]
    if not known:
        lines = read(root / "proc/cpuinfo").splitlines()
        known = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(known) / len(known) if known else None


def _celsius(root: Path) -> float | None:
    """The hottest thermal zone, or where there is none the hottest sensor of the processor."""
    places = list(root.glob("sys/class/thermal/thermal_zone*/temp")) or [
        path
        for chip in root.glob("sys/class/hwmon/hwmon*/name")
        if read(chip) in _PROCESSOR_SENSORS
        for path in chip.parent.glob("temp*_input")
    ]
    degrees = [value / 1000 for path in places if (value := whole(path)) is not None]
    low, high = _POSSIBLE_CELSIUS
    return max((value for value in degrees if low < value < high), default=None)


def _pi_flags(root: Path, vcgencmd: Callable[[], str]) -> int:
    text = read(root / _PI_FLAGS)
    if not text and read(root / "proc/device-tree/model").startswith("Raspberry Pi"):
        text = vcgencmd().partition("=")[2]
    try:
        return int(text or "0", 16)
    except ValueError:
        return 0


def _ask_vcgencmd() -> str:
    program = shutil.which("vcgencmd")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "get_throttled"], capture_output=True, text=True, timeout=_VCGENCMD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _capped(root: Path) -> dict[str, str]:
    """Cooling devices of processors and GPUs that are at work: the kernel lowers their clock."""
    found = {}
    for folder in sorted(root.glob("sys/class/thermal/cooling_device*")):
        kind, state = read(folder / "type"), whole(folder / "cur_state") or 0
        named = kind.lower()
        if state > 0 and any(part in named for part in ("cpu", "processor", "gpu", "devfreq")):
            found[folder.name] = f"clock lowered by {kind} (step {state} of {read(folder / 'max_state') or '?'})"
    return found


def _throttle_counts(root: Path) -> dict[str, int]:
    """Counters of Intel's processors (``thermal_throttle``) and of Jetson's over-current protection."""
    counts: dict[str, int] = {}
    for path in (root / _CPUS).glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        counts["processor throttled"] = counts.get("processor throttled", 0) + (whole(path) or 0)
    for path in sorted(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")):
        counts[f"over-current protection {path.name.partition('_')[0]}"] = whole(path) or 0
    return counts


def read(path: Path) -> str:
    """A file's text without white space and zero bytes at its ends; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""


def whole(path: Path) -> int | None:
    """The whole number in a file; ``None`` where there is none."""
    try:
        return int(read(path))
    except ValueError:
        return None
