"""``kiridashi publish``: sign a bundle for a line and offer it to the line's devices."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from kiridashi.command import Command, Outcome

from kiridashi_server.cli.plant_state import add_state_argument, opened_server


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle folder, as written by 'kiridashi cut'")
    parser.add_argument("--line", required=True, help="the line that the bundle is for")
    offer = parser.add_mutually_exclusive_group()
    offer.add_argument("--hold", action="store_true", help="sign and store only; tell no device yet")
    offer.add_argument("--devices", metavar="A,B", help="tell only these devices (default: all of the line)")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    devices = [name.strip() for name in arguments.devices.split(",")] if arguments.devices else None
    with opened_server(arguments) as server:
        release = server.publish(arguments.bundle, arguments.line)
        told = 0
        if not arguments.hold:
            told = server.set_desired(arguments.line, version=release.version, devices=devices)
    held = "held back: no device was told" if arguments.hold else f"{told} device(s) get a new desired state"
    text = f"published {release.target} ({release.manifest_digest}); {held}"
    return Outcome(asdict(release) | {"devices_told": told, "held": arguments.hold}, text)


COMMANDS = (Command("publish", "sign a bundle for a line and offer it to devices", _configure, _run),)
