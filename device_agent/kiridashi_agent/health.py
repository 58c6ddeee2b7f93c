"""What a device needs to do its work, one thing at a time: how it is, in words, and what to do if it is not well."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec
from kiridashi.budget import MIB
from kiridashi.config import Config
from kiridashi.errors import ExitCode, KiridashiError
from kiridashi.kept import KeptSamples
from kiridashi.runtime import available_runtimes
from kiridashi.spool import SpoolFolder

from kiridashi_agent.broker import MqttSettings, diagnose
from kiridashi_agent.cage import open_cage
from kiridashi_agent.identity import certificate_validity
from kiridashi_agent.journal import Journal
from kiridashi_agent.metadata import CLOCK_SLACK_S, PINNED_ROOT, clock_floor_s, read_pinned_root
from kiridashi_agent.reporting import waits_for

_SOON = timedelta(days=30)
_SYNCHRONISED = Path("/run/systemd/timesync/synchronized")
_MOUNTS = Path("/proc/self/mounts")
_LOST_AT_RESTART = {"tmpfs": "in memory", "ramfs": "in memory", "overlay": "on an overlay, which may be in memory"}
_PRIVATE = (Path("tls/key.pem"), Path("trust/seal.key"))
_SET_CLOCK = "set the clock: timedatectl set-ntp true, or without a network timedatectl set-time 'YYYY-MM-DD hh:mm'"
_ENROL = "enrol again: kiridashi-agent enroll request"


@dataclass(frozen=True)
class Check:
    """One thing looked at: how it is, in words, and what to do if it is not well."""

    name: str
    result: Literal["ok", "warning", "failed"]
    detail: str
    next_step: str = ""
    code: ExitCode = ExitCode.OK


Look = Callable[[Config], Check]


def look_at(config: Config, *, offline: bool) -> Iterator[Check]:
    """Every check in turn; with ``offline`` the broker is not asked."""
    looks: tuple[Look, ...] = (permissions, storage, disk, clock, certificates, root, runtimes, samples, memory, lines)
    for look in looks if offline else (*looks, broker):
        yield guarded(look, config)


def guarded(look: Look, config: Config) -> Check:
    """``look``, or its error as a failed check."""
    try:
        return look(config)
    except KiridashiError as error:
        return Check(look.__name__, "failed", str(error), error.next_step, error.exit_code)
    except OSError as error:  # also of files that the agent beside takes away meanwhile
        return Check(look.__name__, "failed", str(error), "look again: kiridashi-agent doctor", ExitCode.STATE)


def broker(config: Config) -> Check:
    """Whether the broker can be reached, over TLS where that is configured."""
    settings = MqttSettings.from_config(config)
    address = f"{settings.host}:{settings.port}"
    problem = diagnose(settings)
    if problem:
        step = "check that the broker runs, that its address is right, and that no firewall is between"
        return Check("broker", "failed", f"{address}: {problem}", step, ExitCode.NETWORK)
    return Check("broker", "ok", f"{address} answers{' over TLS' if settings.tls else ' (no TLS: this machine)'}")


def certificates(config: Config) -> Check:
    """Whether the device's certificate and its authority's are valid now, and for how long."""
    files = [file for file in (config.broker.cert, config.broker.ca) if file is not None]
    if not files:
        return Check("certificate", "ok", "none needed: the broker is on this machine and without TLS")
    now = datetime.now(UTC)
    spans = {file: certificate_validity(file) for file in files}
    for file, (begin, end) in spans.items():
        if now < begin:
            detail = f"{file.name} is valid from {begin:%Y-%m-%d} on, and the clock says {now:%Y-%m-%d}"
            return Check("certificate", "failed", detail, _SET_CLOCK, ExitCode.TRUST)
        if end < now:
            detail = f"{file.name} expired on {end:%Y-%m-%d}, and the clock says {now:%Y-%m-%d}"
            return Check("certificate", "failed", detail, f"look at the clock (date); {_ENROL}", ExitCode.TRUST)
    file, (_, end) = min(spans.items(), key=lambda item: item[1][1])
    if end - now < _SOON:
        return Check("certificate", "warning", f"{file.name} expires on {end:%Y-%m-%d}, soon", _ENROL)
    return Check("certificate", "ok", f"valid until {end:%Y-%m-%d}")


def root(config: Config) -> Check:
    """Whether a TUF root is pinned, and how old what it vouches for is."""
    state = config.device.state_dir
    data = read_pinned_root(state)
    newest = state / PINNED_ROOT.parent / "metadata" / "timestamp.json"
    until = _expiry(newest.read_bytes()) if newest.is_file() else None
    detail = f"a TUF root of {len(data)} bytes is pinned"
    if until is not None and until < datetime.now(UTC):
        step = "connect to the fleet's server (kiridashi serve), or kiridashi-agent import a newly written stick"
        return Check("root", "warning", f"{detail}; newest signatures expired on {until:%Y-%m-%d}: models stay", step)
    return Check("root", "ok", detail + (f"; newest signatures hold until {until:%Y-%m-%d}" if until else ""))


def clock(config: Config) -> Check:
    """Whether the clock can be right."""
    behind_s = clock_floor_s(config.device.state_dir / "trust" / "metadata") - time.time()
    if behind_s > CLOCK_SLACK_S:
        detail = f"{behind_s:.0f} s behind the last trusted update"
        return Check("clock", "failed", detail, _SET_CLOCK, ExitCode.TRUST)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    how = "set by NTP" if _SYNCHRONISED.exists() else "not set by timesyncd since the start"
    return Check("clock", "ok", f"{now}, not behind the last trusted update; {how}")


def runtimes(_config: Config) -> Check:
    """Whether a model can be run at all."""
    found = available_runtimes()
    if not found:
        step = "pip install 'kiridashi[line]' (onnxruntime) or 'kiridashi[litert]'"
        return Check("runtimes", "failed", "none is installed", step, ExitCode.RUNTIME)
    return Check("runtimes", "ok", ", ".join(found.values()))


def samples(config: Config) -> Check:
    """Whether lines that are to be tuned have something to tune on."""
    wanted = {line: section.samples for line, section in config.lines.items() if section.samples and section.tune}
    empty = [
        line
        for line, folder in wanted.items()
        if folder is not None
        and not any((*folder.glob("*.npz"), *folder.glob("*/")))
        and not SpoolFolder(config.device.state_dir, line).answers_path.is_file()
        and not KeptSamples(config.device.state_dir, line).path.is_file()
    ]
    if empty:
        detail = f"no samples for {', '.join(empty)}: new models will not be tuned there"
        step = "put labelled .npz files into the configured folder, or name frames: kiridashi-agent label"
        return Check("samples", "warning", detail, step)
    return Check("samples", "ok", f"{len(wanted)} line(s) have local samples to tune on")


def memory(_config: Config) -> Check:
    """Whether the kernel limits the memory of jobs."""
    with open_cage(64 * MIB) as cage:
        kind = cage.kind
    if kind == "cgroup":
        return Check("memory limit", "ok", "the kernel can limit the memory of measuring and tuning")
    detail = "the kernel's memory controller is not available; resource limits are used instead"
    step = (
        "the service has it (Delegate=memory); on Raspberry Pi OS add 'cgroup_enable=memory' to the line in "
        "/boot/firmware/cmdline.txt and restart"
    )
    return Check("memory limit", "warning", detail, step)


def lines(config: Config) -> Check:
    """Whether every line has a sound model, or waits for something."""
    records = Journal(config.device.state_dir / "journal").lines()
    for line, record in records.items():
        if record.unread and record.state.error is not None:
            return Check("lines", "failed", f"{line}: {record.state.error.message}", code=ExitCode.STATE)
    damaged = [line for line, record in records.items() if record.damaged]
    if damaged:
        detail = f"what {', '.join(damaged)} serves was damaged on the disk, and is not fetched again yet"
        step = "let the device reach its server, or kiridashi-agent import the version; lines that run go on until then"
        return Check("lines", "failed", detail, step, ExitCode.STATE)
    waiting = {line: waits_for(record) for line, record in records.items()}
    words = [f"{line} waits for the {what} to go on with its update" for line, what in waiting.items() if what]
    if words:
        step = "connect it, or wait: what serves is sound" if "network" in waiting.values() else _SET_CLOCK
        return Check("lines", "warning", "; ".join(words), step)
    return Check("lines", "ok", f"{len(config.lines)} line(s) configured; none waits")


def disk(config: Config) -> Check:
    """Whether another bundle like the largest one here would fit."""
    state = config.device.state_dir
    usage = shutil.disk_usage(state)
    keep = config.limits.free_disk_mib * MIB
    slots = [_size(folder) for folder in state.glob("lines/*/[ab]")]
    detail = f"{usage.free / MIB:.0f} of {usage.total / MIB:.0f} MiB free in {state}"
    if usage.free < keep:
        why = f"{detail}, and limits.free_disk_mib keeps {config.limits.free_disk_mib} free: nothing can be fetched"
        return Check("disk", "failed", why, "make room on that disk, or lower limits.free_disk_mib", ExitCode.STATE)
    if usage.free < keep + max(slots, default=64 * MIB):
        why = f"{detail}: a bundle like the largest here ({max(slots, default=0) / MIB:.0f} MiB) may not fit"
        return Check("disk", "warning", why, "make room on that disk")
    return Check("disk", "ok", detail)


def permissions(config: Config) -> Check:
    """Whether this account can write the state folder, and nobody else reads the keys."""
    state = config.device.state_dir
    try:
        with tempfile.TemporaryFile(dir=state):
            owner = state.stat().st_uid
    except OSError as error:
        step = "run it as the agent's account (sudo -u kiridashi …), or see why the folder cannot be written"
        return Check("permissions", "failed", f"{state} cannot be written: {error.strerror}", step, ExitCode.STATE)
    if owner != os.geteuid():
        detail = f"{state} belongs to user id {owner}, this is {os.geteuid()}"
        return Check("permissions", "failed", detail, "run it as that account: sudo -u kiridashi …", ExitCode.STATE)
    keys = [state / key for key in _PRIVATE if (state / key).exists()]
    bare = [str(key) for key in keys if stat.S_IMODE(key.stat().st_mode) & 0o077]
    if bare:
        step = f"chmod 600 {' '.join(bare)}; if others had access, enrol again"
        return Check("permissions", "failed", f"others may read {', '.join(bare)}", step, ExitCode.TRUST)
    return Check("permissions", "ok", f"{state} is ours, and {len(keys)} private key(s) are readable by us alone")


def storage(config: Config) -> Check:
    """Whether what is written survives a restart; a root that is mounted read-only is fine."""
    state = config.device.state_dir
    read_only = bool(os.statvfs("/").f_flag & os.ST_RDONLY)
    detail = f"the root is {'read-only' if read_only else 'writable'}; all that is written lies below {state}"
    kind = _file_system(state.resolve(), _MOUNTS)
    if kind in _LOST_AT_RESTART:
        step = "mount a partition there, or name another state folder"
        return Check("storage", "warning", f"{state} is {_LOST_AT_RESTART[kind]}: a restart may lose it", step)
    return Check("storage", "ok", f"{detail} ({kind})")


def _file_system(path: Path, mounts: Path) -> str:
    """The type of the file system that ``path`` lies on."""
    found, kind = Path("/"), "unknown"
    for row in mounts.read_text().splitlines():
        _, place, name, *_ = row.split(" ")
        mounted = Path(place.replace("\\040", " "))
        if path.is_relative_to(mounted) and len(mounted.parts) >= len(found.parts):
            found, kind = mounted, name
    return kind


def _expiry(metadata: bytes) -> datetime | None:
    """When a TUF metadata file ends to be believed; its signatures are not checked here."""
    try:
        return msgspec.json.decode(metadata, type=_Metadata).signed.expires
    except msgspec.MsgspecError:
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Signed(msgspec.Struct):
    expires: datetime


class _Metadata(msgspec.Struct):
    signed: _Signed
