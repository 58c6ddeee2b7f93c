"""``kiridashi line``: the production lines of the plant."""

from __future__ import annotations

import argparse
from typing import Any

from kiridashi.command import Command, Outcome

from kiridashi_server.cli.plant_state import add_state_argument, opened_server


def _configure_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the line: lower-case letters, digits and hyphens")
    add_state_argument(parser)


def _add(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        added = server.add_line(arguments.name)
    text = f"line '{arguments.name}' " + ("was added, with a signing key of its own" if added else "was there already")
    return Outcome({"line": arguments.name, "added": added}, text)


def _list(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        devices, lines, releases = server.registry.devices(), server.registry.lines(), server.registry.releases()
    rows: list[dict[str, Any]] = [
        {
            "line": line.name,
            "offered": line.offered,
            "versions": [release.version for release in releases if release.line == line.name],
            "devices": [device.name for device in devices if line.name in device.lines],
        }
        for line in lines
    ]
    text = "\n".join(
        f"{row['line']}: offered {row['offered'] or 'nothing'}, published {row['versions'] or 'nothing'}, "
        f"devices {', '.join(row['devices']) or 'none'}"
        for row in rows
    )
    return Outcome({"lines": rows}, text or "there are no lines yet; next: kiridashi line add NAME")


COMMANDS = (
    Command("line add", "add a production line", _configure_add, _add),
    Command("line list", "show lines, their versions and their devices", add_state_argument, _list),
)
