"""``kiridashi-agent doctor``: is everything here that the agent needs?"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from kiridashi.budget import MIB
from kiridashi.command import Command, Outcome
from kiridashi.config import Config
from kiridashi.errors import ExitCode, KiridashiError
from kiridashi.runtime import available_runtimes
from kiridashi.spool import SpoolFolder

from kiridashi_agent.broker import MqttSettings, diagnose
from kiridashi_agent.cage import open_cage
from kiridashi_agent.cli.place import add_state_argument, opened_config
from kiridashi_agent.identity import certificate_expiry
from kiridashi_agent.metadata import CLOCK_SLACK_S, clock_floor_s, read_pinned_root

_SOON = timedelta(days=30)
_WANTED_FREE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Check:
    """One thing looked at: how it is, in words, and what to do if it is not well."""

    name: str
    result: Literal["ok", "warning", "failed"]
    detail: str
    next_step: str = ""
    code: ExitCode = ExitCode.OK


def _run(arguments: argparse.Namespace) -> Outcome:
    config = opened_config(arguments)
    checks = [
        _guarded(look, config) for look in (_broker, _certificate, _root, _clock, _runtimes, _samples, _memory, _disk)
    ]
    failed = [check for check in checks if check.result == "failed"]
    marks = {"ok": "ok      ", "warning": "warning ", "failed": "FAILED  "}
    rows = []
    for check in checks:
        rows.append(f"{marks[check.result]}{check.name}: {check.detail}")
        if check.next_step:
            rows.append(f"          next: {check.next_step}")
    data = {"healthy": not failed, "checks": [asdict(check) for check in checks]}
    return Outcome(data, "\n".join(rows), failed[0].code if failed else ExitCode.OK)


def _guarded(look: Callable[[Config], Check], config: Config) -> Check:
    try:
        return look(config)
    except KiridashiError as error:
        return Check(look.__name__.lstrip("_"), "failed", str(error), error.next_step, error.exit_code)


def _broker(config: Config) -> Check:
    settings = MqttSettings.from_config(config)
    address = f"{settings.host}:{settings.port}"
    problem = diagnose(settings)
    if problem:
        step = "check that the broker runs, that its address is right, and that no firewall is between"
        return Check("broker", "failed", f"{address}: {problem}", step, ExitCode.NETWORK)
    return Check("broker", "ok", f"{address} answers{' over TLS' if settings.tls else ' (no TLS: this machine)'}")


def _certificate(config: Config) -> Check:
    if config.broker.cert is None:
        return Check("certificate", "ok", "none needed: the broker is on this machine and without TLS")
    expiry = certificate_expiry(config.broker.cert)
    left = expiry - datetime.now(UTC)
    step = "enrol again: kiridashi-agent enroll request"
    if left < timedelta(0):
        return Check("certificate", "failed", f"expired on {expiry:%Y-%m-%d}", step, ExitCode.TRUST)
    if left < _SOON:
        return Check("certificate", "warning", f"expires on {expiry:%Y-%m-%d}, in {left.days} days", step)
    return Check("certificate", "ok", f"valid until {expiry:%Y-%m-%d}")


def _root(config: Config) -> Check:
    data = read_pinned_root(config.device.state_dir)
    return Check("root", "ok", f"a TUF root of {len(data)} bytes is pinned")


def _clock(config: Config) -> Check:
    behind_s = clock_floor_s(config.device.state_dir / "trust" / "metadata") - time.time()
    if behind_s > CLOCK_SLACK_S:
        detail = f"{behind_s:.0f} s behind the last trusted update"
        return Check("clock", "failed", detail, "timedatectl set-ntp true", ExitCode.TRUST)
    return Check("clock", "ok", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, not behind the last trusted update")


def _runtimes(_config: Config) -> Check:
    found = available_runtimes()
    if not found:
        step = "pip install 'kiridashi[line]' (onnxruntime) or 'kiridashi[litert]'"
        return Check("runtimes", "failed", "none is installed", step, ExitCode.RUNTIME)
    return Check("runtimes", "ok", ", ".join(found.values()))


def _samples(config: Config) -> Check:
    wanted = {line: section.samples for line, section in config.lines.items() if section.samples and section.tune}
    empty = [
        line
        for line, folder in wanted.items()
        if folder is not None
        and not any(folder.glob("*.npz"))
        and not SpoolFolder(config.device.state_dir, line).answers_path.is_file()
    ]
    if empty:
        detail = f"no samples for {', '.join(empty)}: new models will not be tuned there"
        return Check(
            "samples",
            "warning",
            detail,
            "put labelled .npz files into the configured folder, or name frames: kiridashi-agent label",
        )
    return Check("samples", "ok", f"{len(wanted)} line(s) have local samples to tune on")


def _memory(_config: Config) -> Check:
    with open_cage(64 * MIB) as cage:
        kind = cage.kind
    if kind == "cgroup":
        return Check("memory limit", "ok", "the kernel can limit the memory of measuring and tuning")
    detail = "the kernel's memory controller is not available; resource limits are used instead"
    step = "on Raspberry Pi OS add 'cgroup_enable=memory' to the line in /boot/firmware/cmdline.txt and restart"
    return Check("memory limit", "warning", detail, step)


def _disk(config: Config) -> Check:
    free = shutil.disk_usage(config.device.state_dir).free
    detail = f"{free / MIB:.0f} MiB free in {config.device.state_dir}"
    if free < _WANTED_FREE_BYTES:
        return Check("disk", "failed", detail, "make room: a bundle needs some tens of MiB", ExitCode.STATE)
    return Check("disk", "ok", detail)


COMMANDS = (
    Command("doctor", "check broker, certificates, runtimes, limits, disk and clock", add_state_argument, _run),
)
