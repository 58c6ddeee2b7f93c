"""A plant in a folder: server, broker and one device, with the real commands and mutual TLS on loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import write_atomic
from kiridashi.config import CONFIG_NAME, load_config, render_config
from kiridashi.enrolment import EnrolRequest, decode_enrolment, encode_enrolment
from kiridashi.errors import ExitCode, KiridashiError
from kiridashi.messages import LineState, Reported
from kiridashi.samples import write_samples

from kiridashi_server.budget.device import agent_command
from kiridashi_server.fleet.broker import LOOPBACK, free_port
from kiridashi_server.fleet.connection import BrokerAddress
from kiridashi_server.fleet.server import PlantServer
from kiridashi_server.leftover import stop_leftover
from kiridashi_server.tasks import SplitName, Task

DEVICE = "quickstart-device"
RECALL_POLICY = 1.0
"""No class of the quickstart's task must be found at any price, so accuracy on the hold-out alone decides on tuning."""
_AGENT_TIMEOUT_S = 600
_AGENT_PID = "agent.pid"


class DeliveryError(KiridashiError):
    """The device did not activate the model."""

    exit_code = ExitCode.RUNTIME


class Delivered(msgspec.Struct, frozen=True):
    """What became true on the device, as it reported it, and which broker carried it."""

    reported: Reported
    broker_kind: str
    broker: str

    def line(self, name: str) -> LineState:
        """The state of one line."""
        return self.reported.lines[name]


def deliver(
    bundle: Path, line: str, task: Task, server_dir: Path, device_dir: Path, tell: Callable[[str], None]
) -> Delivered:
    """Start a plant, enrol a device with local samples, publish the bundle and run the agent until it rests.

    Both folders are made anew, and what a killed run left working in them is ended. The device's samples are the
    task's ``tune`` and ``holdout`` splits.

    Raises:
        DeliveryError: the agent rejected the model or ended without activating it.
        NetworkError: no broker could be started.
    """
    server_dir, device_dir = server_dir.absolute(), device_dir.absolute()
    stop_leftover(device_dir / _AGENT_PID, device_dir)
    stop_leftover(server_dir / "broker" / "broker.pid", server_dir / "broker")
    for folder in (server_dir, device_dir):
        shutil.rmtree(folder, ignore_errors=True)
    server = PlantServer.init(server_dir, BrokerAddress(LOOPBACK, free_port()))
    try:
        server.add_line(line)
        with server.start_broker() as broker:
            tell(f"broker: {broker.description}")
            _enrol(server, line, task, device_dir)
            server.publish(bundle, line)
            server.set_desired(line)
            with server.serving():
                _agent(device_dir, "run", "--once", "--timeout", str(_AGENT_TIMEOUT_S))
            device = server.registry.device(DEVICE)
            if device is None or device.reported is None or line not in device.reported.lines:
                raise DeliveryError("the device never reported", next_step=f"see {server_dir / 'broker'}")
            delivered = Delivered(device.reported, broker.kind, broker.description)
    finally:
        server.close()
    _require_active(delivered.line(line))
    return delivered


def write_local_samples(task: Task, folder: Path) -> None:
    """The task's ``tune`` and ``holdout`` splits as a device's sample files."""
    splits: tuple[tuple[SplitName, bool], ...] = (("tune", False), ("holdout", True))
    for split, held_out in splits:
        samples = task.split(split)
        names = [task.labels[label] for label in samples.labels]
        write_samples(folder / f"{split}.npz", samples.images, names, np.full(len(samples), held_out))


def _enrol(server: PlantServer, line: str, task: Task, device_dir: Path) -> None:
    request_file, ticket_file = device_dir / "request.json", device_dir / "ticket.json"
    device_dir.mkdir(parents=True)
    _agent(device_dir, "enroll", "request", "--device", DEVICE, "-o", str(request_file))
    request = decode_enrolment(request_file.read_bytes(), EnrolRequest, str(request_file))
    write_atomic(ticket_file, encode_enrolment(server.enrol(request, [line])), mode=0o600)
    _agent(device_dir, "enroll", "install", str(ticket_file))
    write_local_samples(task, device_dir / "samples")
    path = device_dir / CONFIG_NAME
    config = load_config(path)
    section = msgspec.structs.replace(config.lines[line], samples=device_dir / "samples", max_recall_drop=RECALL_POLICY)
    config = msgspec.structs.replace(config, lines={**config.lines, line: section})
    write_atomic(path, render_config(config).encode(), mode=0o600)


def _agent(state: Path, *arguments: str) -> None:
    command = [agent_command(), *arguments, "--state", str(state), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        write_atomic(state / _AGENT_PID, f"{process.pid}\n".encode())
        try:
            out, err = process.communicate(timeout=_AGENT_TIMEOUT_S + 60)
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return
    try:
        error = json.loads(out)["error"]
    except (ValueError, KeyError, TypeError):
        last = "\n".join(err.strip().splitlines()[-5:])
        raise DeliveryError(f"kiridashi-agent {arguments[0]} ended with code {process.returncode}", why=last) from None
    raise DeliveryError(error["what"], why=error["why"], next_step=error["next"])


def _require_active(state: LineState) -> None:
    if state.phase == "active":
        return
    why = state.error.message if state.error else f"the line is {state.phase}"
    raise DeliveryError(
        "the device did not activate the model",
        why=why,
        next_step="run the same command again; finished stages are kept",
    )
