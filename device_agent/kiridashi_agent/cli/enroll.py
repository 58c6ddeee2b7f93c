"""``kiridashi-agent enroll``: become a member of the fleet, in two steps, without the keys leaving the device."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from kiridashi.artifacts import write_atomic
from kiridashi.command import Command, Outcome
from kiridashi.enrolment import EnrolTicket, decode_enrolment, encode_enrolment
from kiridashi.errors import InputError

from kiridashi_agent.cli.place import add_state_argument, check_account
from kiridashi_agent.identity import create_request, install_ticket


def _configure_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", required=True, metavar="NAME", help="this device's name")
    parser.add_argument("-o", "--output", type=Path, default=Path("request.json"), help="the file to write")
    add_state_argument(parser)


def _request(arguments: argparse.Namespace) -> Outcome:
    if arguments.state.exists():
        check_account(arguments.state)
    request = create_request(arguments.device, arguments.state)
    try:
        write_atomic(arguments.output, encode_enrolment(request))
    except OSError as error:
        why = error.strerror or str(error)  # the path in it is that of a file beside the output
        step = "name another file with --output; the keys were made, and the next request has the same"
        raise InputError(f"the request cannot be written to {arguments.output}", why=why, next_step=step) from error
    text = (
        f"wrote {arguments.output} for device '{request.device}'; its private keys stay in {arguments.state}\n"
        f"next, on the server: kiridashi fleet enroll {arguments.output} --lines NAME -o ticket.json"
    )
    return Outcome({"device": request.device, "request": str(arguments.output), "state": str(arguments.state)}, text)


def _configure_install(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ticket", type=Path, help="the ticket file from the server")
    add_state_argument(parser)


def _install(arguments: argparse.Namespace) -> Outcome:
    try:
        data = arguments.ticket.read_bytes()
    except OSError as error:
        step = "bring the file that 'kiridashi fleet enroll' wrote on the server to this device"
        raise InputError(f"the ticket {arguments.ticket} cannot be read", why=str(error), next_step=step) from error
    ticket = decode_enrolment(data, EnrolTicket, str(arguments.ticket))
    if arguments.state.exists():
        check_account(arguments.state)
    config = install_ticket(ticket, arguments.state, datetime.now(UTC))
    lines = ", ".join(ticket.lines) or "none"
    text = f"device '{ticket.device}' is enrolled for lines: {lines}\nwrote {config}\nnext: kiridashi-agent run"
    return Outcome({"device": ticket.device, "lines": list(ticket.lines), "config": str(config)}, text)


COMMANDS = (
    Command("enroll request", "make this device's keys and its enrolment request", _configure_request, _request),
    Command("enroll install", "check and install the server's ticket", _configure_install, _install),
)
