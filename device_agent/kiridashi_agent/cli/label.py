"""``kiridashi-agent label``: a page on this device on which people name frames of a line."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from types import FrameType

import msgspec
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError, StateError
from kiridashi.manifest import decode_manifest
from kiridashi.slots import LineSlots
from kiridashi.spool import SpoolFolder

from kiridashi_agent.cli.place import add_line_argument, add_state_argument, check_account
from kiridashi_agent.label.access import Access
from kiridashi_agent.label.server import LabelServer
from kiridashi_agent.label.session import LabelGoal, LabelSession
from kiridashi_agent.label.summary import named_frames

DEFAULT_PORT = 8770


def _configure(parser: argparse.ArgumentParser) -> None:
    add_line_argument(parser)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"(default {DEFAULT_PORT}; 0 takes a free one)")
    parser.add_argument(
        "--bind", default="127.0.0.1", metavar="ADDRESS", help="listen there; other than the loopback, a code is asked"
    )
    parser.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="a host name that browsers use for this device"
    )
    parser.add_argument("--per-class", type=int, default=20, metavar="N", help="frames wanted of every class")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    _check(arguments)
    check_account(arguments.state)
    folder = SpoolFolder(arguments.state, arguments.line)
    current_goal = partial(_goal, LineSlots(arguments.state, arguments.line), arguments.per_class)
    goal = current_goal()
    access = Access.to(arguments.bind, tuple(arguments.name))
    try:
        session = LabelSession(folder, goal)
        server = LabelServer(arguments.bind, arguments.port, arguments.line, session, access, current_goal)
    except OSError as error:
        step = "name another --port, or check who owns the state folder"
        raise StateError("the page cannot be served", why=str(error), next_step=step) from error
    host = _shown_host(arguments.bind, arguments.name)
    _say(f"open http://{host}:{server.server_port}/ in a browser; stop with Ctrl-C")
    if access.code:
        _say(f"code for other hosts: {access.code}")
        _say("the connection is not encrypted: use it in a network that you trust, or through an SSH tunnel")
    _serve_until_stopped(server)
    frames = named_frames(folder)
    return Outcome({"line": folder.line, **msgspec.to_builtins(frames)}, f"frames of line '{folder.line}': {frames}")


def _check(arguments: argparse.Namespace) -> None:
    try:
        ipaddress.ip_address(arguments.bind)
    except ValueError as error:
        raise InputError(f"'{arguments.bind}' is not an IP address", next_step="--bind 127.0.0.1") from error
    if not 0 <= arguments.port <= 65535 or not 1 <= arguments.per_class <= 500:
        raise InputError("--port is 0 to 65535, --per-class 1 to 500")


def _shown_host(bind: str, names: Sequence[str]) -> str:
    """What stands in the address of a browser: nobody can open 0.0.0.0 from another computer."""
    if ipaddress.ip_address(bind).is_unspecified:
        return names[0] if names else "ADDRESS-OF-THIS-DEVICE"
    return f"[{bind}]" if ":" in bind else bind


def _goal(slots: LineSlots, per_class: int) -> LabelGoal:
    """The classes of the line's active model, and how many frames of each are wanted."""
    active = slots.served()
    path = slots.folder(active.slot) / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"the classes of line '{slots.line}' cannot be read", why=str(error)) from error
    return LabelGoal(decode_manifest(data, str(path)).labels, active.model_digest, per_class)


def _serve_until_stopped(server: LabelServer) -> None:
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    serving = threading.Thread(target=server.serve_forever, name="label-page")
    serving.start()
    try:
        stop.wait()
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


COMMANDS = (Command("label", "serve a page on which people name frames of a line", _configure, _run),)
