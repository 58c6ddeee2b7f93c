"""What this machine says of itself: its class, real or emulated, how hot and how busy, and what this process has used.

Everything is read from ``/proc`` and ``/sys``; a file that is not there is simply not reported.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from kiridashi.budget import MIB
from kiridashi.messages import check_name

HARDWARE_VARIABLE = "KIRIDASHI_HARDWARE"
HOT_CELSIUS = 80.0
_THROTTLED = Path("sys/devices/platform/soc/soc:firmware/get_throttled")
_GOVERNOR = Path("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_MODALIAS = Path("sys/devices/system/cpu/modalias")
_BOARD = Path("proc/device-tree/model")
_CPUINFO = Path("proc/cpuinfo")
_MEMINFO = Path("proc/meminfo")
_CLOCKS = Path("sys/devices/system/clocksource/clocksource0/available_clocksource")
_STATUS = Path("/proc/self/status")
_ROOT = Path("/")
_LONGEST_NAME = 63
_UNSPECIFIC = re.compile(r"\((?:r|tm)\)|@.*|\bcpu\b|\brev(?:ision)? [0-9.]+", re.IGNORECASE)
"""What tells apart machines that are alike: trade marks, the clock rate on the label, a board's revision."""


def hardware_kind(machine: str | None = None, root: Path = _ROOT) -> Literal["real", "emulated"]:
    """Whether timings are those of this processor.

    Under user-mode emulation the kernel below is another machine's: its own name for the processor
    (``cpu:type:x86,…``) does not fit what the program is told. A whole machine that QEMU emulates has a processor or a
    board with QEMU's name. One whose processor is real (KVM and others) counts as real, and :func:`virtual_machine`
    names it. ``KIRIDASHI_HARDWARE`` overrides.
    """
    told = os.environ.get(HARDWARE_VARIABLE)
    if told in ("real", "emulated"):
        return "emulated" if told == "emulated" else "real"
    if virtual_machine(root) == "qemu":
        return "emulated"
    seen = machine or os.uname().machine
    kernel = _read(root / _MODALIAS)
    if not kernel.startswith("cpu:type:"):
        return "real"
    family = kernel.removeprefix("cpu:type:").split(",", 1)[0].split(":", 1)[0]
    arm = seen.startswith(("aarch64", "arm"))
    return "emulated" if (family == "x86" and arm) or (family == "aarch64" and not arm) else "real"


def virtual_machine(root: Path = _ROOT) -> str:
    """The hypervisor below this system: "kvm", "xen", …; "qemu" where QEMU emulates the processor; empty if none shows.

    KVM shows by its clock or its device tree. QEMU without a sign of KVM is taken for emulation.
    """
    clocks = _read(root / _CLOCKS).split()
    compatible = _read(root / "proc/device-tree/hypervisor/compatible")
    known = {"kvm-clock": "kvm", "xen": "xen", "hyperv_clocksource_tsc_page": "hyperv"}
    named = [name for sign, name in known.items() if sign in clocks]
    named += [name for name in ("kvm", "xen", "vmware") if name in compatible.lower()]
    if named:
        return named[0]
    processor = _field(root / _CPUINFO, "model name")
    if processor.startswith("QEMU") or "linux,dummy-virt" in _read(root / "proc/device-tree/compatible"):
        return "kvm" if "KVM" in _read(root / "sys/class/ptp/ptp0/clock_name") else "qemu"
    return "unnamed" if "hypervisor" in _field(root / _CPUINFO, "flags").split() else ""


def description(root: Path = _ROOT) -> dict[str, str | int]:
    """This kind of machine for a report: nothing that tells one such machine from another.

    Board, processor, architecture, number of processors, memory in MiB, kernel release, and hypervisor.
    """
    system = os.uname()
    return {
        "board": _read(root / _BOARD).rstrip("\0"),
        "processor": _field(root / _CPUINFO, "model name"),
        "architecture": system.machine,
        "processors": os.cpu_count() or 1,
        "memory_mib": _meminfo_bytes(root, "MemTotal") // MIB,
        "kernel": system.release,
        "virtual": virtual_machine(root),
    }


def device_class(root: Path = _ROOT, machine: str | None = None, processors: int | None = None) -> str:
    """What devices like this one are called: ``raspberry-pi-4-model-b-4c-4gib``.

    The board's name where the firmware gives one, else the processor's, else the architecture; then the number of
    processors and the memory, rounded up to a size that is sold. A valid name of at most 63 characters.
    """
    board = _read(root / _BOARD).rstrip("\0")
    name = board or _field(root / _CPUINFO, "model name") or machine or os.uname().machine
    size_mib = _nominal_mib(_meminfo_bytes(root, "MemTotal") // MIB)
    memory = f"{size_mib // 1024}gib" if size_mib >= 1024 else f"{size_mib}mib"
    tail = f"-{processors or os.cpu_count() or 1}c-{memory}"
    slug = re.sub(r"[^a-z0-9]+", "-", _UNSPECIFIC.sub(" ", name).lower()).strip("-") or "unknown"
    return check_name(slug[: _LONGEST_NAME - len(tail)].rstrip("-") + tail, "device class")


def available_bytes(root: Path = _ROOT) -> int:
    """Memory that new processes may use without swapping (``MemAvailable``), bytes; 0 where it is not said."""
    return _meminfo_bytes(root, "MemAvailable")


def conditions(root: Path = _ROOT, processors: int | None = None) -> tuple[str, ...]:
    """What may have slowed a measurement: frequency governor, throttling, heat, other load."""
    notes = []
    governor = _read(root / _GOVERNOR)
    if governor and governor != "performance":
        notes.append(f"governor {governor}")
    throttled = _read(root / _THROTTLED)
    if throttled and int(throttled, 16):
        notes.append(f"throttled {throttled}")
    hottest = hottest_celsius(root)
    if hottest is not None and hottest >= HOT_CELSIUS:
        notes.append(f"hot {hottest:.0f} C")
    load = float((_read(root / "proc/loadavg") or "0").split()[0])
    if load > 0.5 * (processors or os.cpu_count() or 1):
        notes.append(f"load {load:.1f}")
    return tuple(notes)


def hottest_celsius(root: Path = _ROOT) -> float | None:
    """The highest temperature that the kernel's thermal zones give, °C; ``None`` if there is none that can be read.

    Source: the kernel's sysfs interface of thermal zones, ``temp`` in thousandths of a degree.
    """
    texts = (_read(path) for path in root.glob("sys/class/thermal/thermal_zone*/temp"))
    return max((int(text) / 1000 for text in texts if text.lstrip("-").isdigit()), default=None)


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had (``VmHWM``), bytes."""
    return _kib(_STATUS, "VmHWM")


def resident_bytes(status: Path = _STATUS) -> int:
    """This process's resident set (``VmRSS``) in bytes, 0 where the kernel does not tell."""
    return _kib(status, "VmRSS")


def rss_bytes() -> int:
    """The resident set of this process now (``VmRSS``), bytes."""
    return int((_field(Path("/proc/self/status"), "VmRSS") or "0").split()[0]) * 1024


def _meminfo_bytes(root: Path, name: str) -> int:
    return _kib(root / _MEMINFO, name)


def _kib(path: Path, name: str) -> int:
    """The bytes of a line ``name: N kB``, 0 if there is none."""
    return int((_field(path, name) or "0").split()[0]) * 1024


def _field(path: Path, name: str) -> str:
    """The value of the first line ``name : value`` of a file in ``/proc``."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _nominal_mib(total_mib: int) -> int:
    """The smallest power of two, or three halves of one, that is not below ``total_mib``: the kernel keeps a part."""
    size = 64
    while size < total_mib:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
