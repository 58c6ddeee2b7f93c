"""``kiridashi-agent doctor``: is everything here that the agent needs?"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from kiridashi.command import Command, Outcome
from kiridashi.config import CONFIG_NAME
from kiridashi.errors import ExitCode, InputError

from kiridashi_agent.cli.place import add_state_argument, opened_config
from kiridashi_agent.health import Check, look_at

_MARKS = {"ok": "ok      ", "warning": "warning ", "failed": "FAILED  "}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="this device has no network: do not ask the broker")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    try:
        config = opened_config(arguments)
    except InputError as error:
        checks = [Check("config", "failed", str(error), error.next_step, error.exit_code)]
    else:
        lines = ", ".join(sorted(config.lines)) or "no line"
        found = f"{arguments.state / CONFIG_NAME}: device '{config.device.id}', {lines}"
        checks = [Check("config", "ok", found), *look_at(config, offline=arguments.offline)]
    failed = [check for check in checks if check.result == "failed"]
    rows = []
    for check in checks:
        rows.append(f"{_MARKS[check.result]}{check.name}: {check.detail}")
        if check.next_step:
            rows.append(f"          next: {check.next_step}")
    data = {"healthy": not failed, "checks": [asdict(check) for check in checks]}
    return Outcome(data, "\n".join(rows), failed[0].code if failed else ExitCode.OK)


COMMANDS = (
    Command("doctor", "check settings, permissions, clock, certificates, runtimes, limits, disk", _configure, _run),
)
