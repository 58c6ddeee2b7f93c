"""``kiridashi fleet``: the plant server's folder and its devices."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.command import Command, Outcome
from kiridashi.enrolment import EnrolRequest, decode_enrolment, encode_enrolment
from kiridashi.errors import InputError

from kiridashi_server.cli.plant_state import add_state_argument, opened_server, parse_lines

DEFAULT_PORT = 8883


def _configure_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="host under which devices reach the broker (default: this machine only)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"its TLS port (default {DEFAULT_PORT})")
    parser.add_argument("--also", action="append", metavar="HOST", help="another name or address of it; repeatable")
    parser.add_argument("--plant", default="plant", help="name that stands in the authority's certificate")
    parser.add_argument("--database", default="", metavar="URL", help="SQLAlchemy URL (default: SQLite in the folder)")
    add_state_argument(parser)


def _init(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.fleet.connection import BrokerAddress
    from kiridashi_server.fleet.server import PlantServer

    server = PlantServer.init(
        arguments.state,
        BrokerAddress(arguments.host, arguments.port) if arguments.host else None,
        plant=arguments.plant,
        hosts=arguments.also,
        database=arguments.database,
    )
    server.close()
    config = server.folder / "mosquitto" / "mosquitto.conf"
    data = {"state": str(server.folder), "broker": str(server.broker_address), "mosquitto_config": str(config)}
    text = (
        f"the plant server in {server.folder} is ready\n"
        f"  configuration for the plant's own mosquitto: {config}\n"
        f"  back up this folder, and keep {server.folder / 'keys'} and {server.folder / 'ca'} private\n"
        f"  next: kiridashi line add NAME; kiridashi serve --with-broker"
    )
    return Outcome(data, text)


def _configure_enroll(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request", type=Path, help="the file that 'kiridashi-agent enroll request' wrote on the device")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="TICKET", help="where the ticket goes")
    parser.add_argument("--lines", required=True, metavar="A,B", help="the lines that the device serves")
    parser.add_argument("--replace", action="store_true", help="the device of this name is gone: take its place")
    add_state_argument(parser)


def _enroll(arguments: argparse.Namespace) -> Outcome:
    lines = parse_lines(arguments.lines)
    try:
        data = arguments.request.read_bytes()
    except OSError as error:
        raise InputError(
            f"the request {arguments.request} cannot be read",
            why=str(error),
            next_step="run 'kiridashi-agent enroll request' on the device and bring its request here",
        ) from error
    request = decode_enrolment(data, EnrolRequest, str(arguments.request))
    with opened_server(arguments) as server:
        ticket = server.enrol(request, lines, replace=arguments.replace)
    write_atomic(arguments.output, encode_enrolment(ticket))
    text = f"device '{ticket.device}' is enrolled for {', '.join(lines)}; bring {arguments.output} to it"
    return Outcome({"device": ticket.device, "lines": lines, "ticket": str(arguments.output)}, text)


def _configure_assign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="name of the device")
    parser.add_argument("--lines", required=True, metavar="A,B", help="all lines that it serves from now on")
    add_state_argument(parser)


def _assign(arguments: argparse.Namespace) -> Outcome:
    lines = parse_lines(arguments.lines)
    with opened_server(arguments) as server:
        server.assign(arguments.device, lines)
    return Outcome(
        {"device": arguments.device, "lines": lines},
        f"device '{arguments.device}' serves {', '.join(lines)}",
    )


def _list(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        devices = server.registry.devices()
    rows = [_summary(device) for device in devices]
    text = "\n".join(
        f"{row['device']}: {row['connection']}, "
        + (
            "; ".join(
                f"{name} {line['phase']} v{line['version']} (wanted {line['wanted']})"
                for name, line in row["lines"].items()
            )
            or "no lines"
        )
        for row in rows
    )
    return Outcome(
        {"devices": rows}, text or "there are no devices yet; next: kiridashi fleet enroll REQUEST -o TICKET"
    )


def _configure_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", help="name of the device")
    parser.add_argument("--events", type=int, default=20, metavar="N", help="how much history (default 20)")
    add_state_argument(parser)


def _show(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        device = server.registry.device(arguments.device)
        events = server.registry.events(arguments.device, arguments.events)
    if device is None:
        raise InputError(f"there is no device '{arguments.device}'", next_step="kiridashi fleet list")
    reported = msgspec.to_builtins(device.reported) if device.reported else None
    data = _summary(device) | {
        "enrolled": device.enrolled,
        "certificate_serial": device.identity.certificate_serial,
        "generation": device.generation,
        "sent_generation": device.sent_generation,
        "reported": reported,
        "reported_at": device.reported_at,
        "drift": _drift(device),
        "events": [asdict(event) for event in events],
    }
    lines = [f"{device.name}: {data['connection']}, desired generation {device.generation}"]
    lines += [
        f"  {name}: {line['phase']}, version {line['version']}, wanted {line['wanted']}"
        for name, line in data["lines"].items()
    ]
    lines += [f"  drift on {row['line']}: {row['text']}" for row in data["drift"]]
    lines += [f"  {event.at}  {event.kind}  {event.payload}" for event in events]
    return Outcome(data, "\n".join(lines))


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("line", help="the line whose bundle is carried")
    parser.add_argument("output", type=Path, metavar="OUT", help="a new folder on the stick, or a file OUT.tar")
    parser.add_argument("--version", type=int, metavar="N", help="a published version (default: the newest)")
    parser.add_argument(
        "--days", type=int, default=30, metavar="N", help="how long it is believed (default 30, the most)"
    )
    add_state_argument(parser)


def _export(arguments: argparse.Namespace) -> Outcome:
    life = timedelta(days=arguments.days)
    with opened_server(arguments) as server:
        index = server.export_stick(arguments.line, arguments.output, version=arguments.version, life=life)
    text = (
        f"wrote {index.target} to {arguments.output}; devices believe it until {index.valid_until}\n"
        f"next, on the device: kiridashi-agent import {arguments.output.name}"
    )
    return Outcome(msgspec.to_builtins(index) | {"output": str(arguments.output)}, text)


def _drift(device: Any) -> list[dict[str, Any]]:
    """What the device's drift watches have found, as it last reported."""
    watches = device.reported.drift if device.reported else {}
    return [
        {"line": line, "text": finding.text, **msgspec.to_builtins(finding)}
        for line, watch in sorted(watches.items())
        for finding in watch.findings
    ]


def _rotate_root(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.fleet.server import utc_now

    with opened_server(arguments) as server:
        version = server.repository.rotate_root_key(utc_now())
    text = f"root version {version} stands, signed by the old and the new key; devices follow by themselves"
    return Outcome({"root_version": version}, text)


def _summary(device: Any) -> dict[str, Any]:
    states = device.reported.lines if device.reported else {}
    lines = {
        line: {
            "wanted": wanted,
            "phase": states[line].phase if line in states else "not reported",
            "version": states[line].version if line in states else 0,
            "tuned": states[line].tuned if line in states else False,
        }
        for line, wanted in device.lines.items()
    }
    connection = {None: "never seen", True: "online", False: "offline"}[device.online]
    return {"device": device.name, "connection": connection, "lines": lines}


COMMANDS = (
    Command("fleet init", "create the plant server's folder: authority, keys, repository", _configure_init, _init),
    Command("fleet enroll", "make a device a member of the fleet", _configure_enroll, _enroll),
    Command("fleet assign", "change the lines of a device", _configure_assign, _assign),
    Command("fleet list", "show all devices", add_state_argument, _list),
    Command("fleet show", "show one device and its history", _configure_show, _show),
    Command("fleet export-usb", "write a line's bundle to a memory stick", _configure_export, _export),
    Command("fleet rotate-root", "replace the root signing key", add_state_argument, _rotate_root),
)
