"""``kiridashi-line``: a line's model for programs that are not written in Python."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from kiridashi.command import Command, Outcome, main
from kiridashi.errors import InputError
from kiridashi.line import LineModel
from kiridashi.line_program import loading
from kiridashi.line_server import DEFAULT_PORT, LineServer, ServerLimits
from kiridashi.runtime.protocol import PREFERENCE

_MIB = 1024 * 1024
_DAY_S = 24 * 3600


def _configure_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--line", action="append", required=True, metavar="NAME", help="the line; may be repeated")
    parser.add_argument("--state", type=Path, metavar="DIR", help="the device's state folder")
    parser.add_argument("--threads", type=int, metavar="N", help="threads inside one prediction (default: as measured)")
    parser.add_argument(
        "--provider", action="append", choices=PREFERENCE, help="what may compute it, best first (default: as measured)"
    )


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    _configure_model(parser)
    parser.add_argument("--spool", action="store_true", help="keep frames for people to name: kiridashi-agent label")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to listen on; 0 for any")
    parser.add_argument("--allow-remote", action="store_true", help="listen on an address that others reach")
    parser.add_argument("--max-body-mib", type=int, default=32, metavar="N", help="size of one request")
    parser.add_argument("--max-frames", type=int, default=32, metavar="N", help="frames in one request")
    parser.add_argument("--max-requests", type=int, default=4, metavar="N", help="requests worked on at once")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds to send a request")


def _serve(arguments: argparse.Namespace) -> Outcome:
    if min(arguments.max_body_mib, arguments.max_frames, arguments.max_requests, arguments.timeout) <= 0:
        raise InputError("limits have to be above 0")
    if not arguments.timeout <= _DAY_S:  # also what is not a number
        raise InputError(f"--timeout is at most {_DAY_S} seconds")
    limits = ServerLimits(
        arguments.max_body_mib * _MIB,
        arguments.max_frames,
        arguments.max_requests,
        timeout_s=arguments.timeout,
    )
    with ExitStack() as stack:
        lines = dict.fromkeys(arguments.line)
        models = {line: stack.enter_context(_open(line, arguments, spool=arguments.spool)) for line in lines}
        server = LineServer(models, arguments.host, arguments.port, limits, allow_remote=arguments.allow_remote)
        stack.callback(server.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            # From a thread: serve_forever, which runs in this one, has to come back first.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        sys.stderr.write(f"serving {', '.join(models)} at {server.url}/v2, stop with Ctrl-C\n")
        sys.stderr.flush()
        server.serve_forever()
    return Outcome({"stopped": True})


def _info(arguments: argparse.Namespace) -> Outcome:
    rows = []
    for line in dict.fromkeys(arguments.line):
        with _open(line, arguments) as model:
            rows.append(asdict(model.info()))
    text = "\n\n".join("\n".join(f"{key:<12}  {value}" for key, value in row.items() if value != "") for row in rows)
    return Outcome({"lines": rows}, text)


def _open(line: str, arguments: argparse.Namespace, *, spool: bool = False) -> LineModel:
    with loading():
        return LineModel.open(line, arguments.state, arguments.threads, arguments.provider, spool=spool)


COMMANDS = (
    Command("serve", "serve lines over HTTP with the KServe v2 protocol, on this machine", _configure_serve, _serve),
    Command("info", "show which model a line has and what computes it here", _configure_model, _info),
)


def run(argv: Sequence[str] | None = None) -> int:
    """The program ``kiridashi-line``."""
    text = "A line's active model for programs that are not written in Python."
    return main("kiridashi-line", text, COMMANDS, argv, extra="line")


if __name__ == "__main__":
    sys.exit(run())
