"""``kiridashi serve``: answer devices, note what they report, and tell them what is wanted."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from contextlib import ExitStack
from threading import Thread
from typing import TYPE_CHECKING

from kiridashi.command import Command, Outcome

from kiridashi_server.cli.plant_state import add_state_argument, opened_server

if TYPE_CHECKING:
    from kiridashi_server.fleet.broker import Broker

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WATCH_S = 0.5


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--with-broker", action="store_true", help="run a broker too (mosquitto if installed)")
    parser.add_argument(
        "--bind", default="127.0.0.1", metavar="ADDRESS", help="where that broker listens (default: this machine only)"
    )
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    with opened_server(arguments) as server, ExitStack() as stack:
        broker = None
        if arguments.with_broker:
            # Before the signals are masked: a child inherits the mask, and a broker must be stoppable.
            broker = stack.enter_context(server.start_broker(bind=arguments.bind))
            _say(f"broker: {broker.description}")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        thread = stack.enter_context(server.serving())
        _say(f"serving {server.folder} through the broker at {server.broker_address}; stop with Ctrl-C")
        _wait_for_signal(thread, broker)
        data = {
            "broker": broker.kind if broker else "external",
            "address": str(server.broker_address),
            "devices": len(server.registry.devices()),
        }
    return Outcome(data, "stopped")


def _wait_for_signal(thread: Thread, broker: Broker | None) -> None:
    """Return at SIGINT or SIGTERM, or when the serving thread has ended; a dead broker of ours is an error."""
    while thread.is_alive() and signal.sigtimedwait(_SIGNALS, _WATCH_S) is None:
        if broker is not None:
            broker.check_alive()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


COMMANDS = (Command("serve", "serve devices until Ctrl-C", _configure, _run),)
