"""Enrolment end to end: the device's request, the server's ticket, and mutual TLS with a real broker."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from agent_program import BINARY, finished, wait_for
from cryptography.hazmat.primitives.serialization import Encoding
from fake_fleet import MqttResponder, free_port, mosquitto
from kiridashi.config import load_config
from kiridashi.enrolment import EnrolRequest, EnrolTicket, decode_enrolment, encode_enrolment
from kiridashi.errors import NetworkError
from kiridashi_agent.broker import MqttSettings, TlsFiles, diagnose
from kiridashi_agent.mqtt import MqttTransport
from kiridashi_server.fleet.authority import Authority

LISTENER = """
listener {port} {address}
cafile {folder}/ca/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
require_certificate true
use_identity_as_username true
"""


class Plant:
    """A certificate authority and a broker: TLS for devices, a plain door for the test's responder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plain, self.secured = folder, free_port(), free_port()
        self.authority = Authority.init(folder / "ca", "test", datetime.now(UTC))
        self.authority.issue_broker(folder, (), datetime.now(UTC))
        (folder / "ca" / "ca.pem").chmod(0o644)

    def ticket(self, request: EnrolRequest, root: bytes) -> EnrolTicket:
        certificate = self.authority.sign_device(request.csr_pem.encode(), request.device, datetime.now(UTC))
        return EnrolTicket(
            device=request.device,
            certificate_pem=certificate.public_bytes(Encoding.PEM).decode(),
            ca_pem=self.authority.certificate_pem.decode(),
            tuf_root=root.decode(),
            broker_host="localhost",
            broker_port=self.secured,
            lines=("press-3",),
        )


@pytest.fixture
def plant(tmp_path):
    plant = Plant(tmp_path)
    doors = [
        LISTENER.format(port=plant.secured, folder=tmp_path, address=address) for address in ("127.0.0.1", "127.0.0.2")
    ]
    with mosquitto(tmp_path, plant.plain, "allow_anonymous true\n" + "".join(doors)):
        yield plant


@pytest.fixture
def state(plant, fleet, tmp_path) -> Path:
    """An enrolled device's state folder, made by the installed commands."""
    state, request, ticket = tmp_path / "state", tmp_path / "request.json", tmp_path / "ticket.json"
    asked = [*BINARY, "enroll", "request", "--device", "cam-1", "--state", str(state), "-o", str(request), "--json"]
    assert finished(asked)[0] == 0
    document = decode_enrolment(request.read_bytes(), EnrolRequest)
    ticket.write_bytes(encode_enrolment(plant.ticket(document, fleet.root)))
    code, installed = finished([*BINARY, "enroll", "install", str(ticket), "--state", str(state), "--json"])
    assert (code, installed["lines"]) == (0, ["press-3"])
    return state


def test_an_enrolled_device_reports_over_mutual_tls(plant, state, fleet) -> None:
    responder = MqttResponder(fleet, plant.plain)
    command = [*BINARY, "run", "--state", str(state)]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: [report for report in responder.states if report.device == "cam-1"])
        code, found = finished([*BINARY, "doctor", "--state", str(state), "--json"])
        assert (code, found["healthy"]) == (0, True), found
        assert "over TLS" in json.dumps(found)
    finally:
        process.terminate()
        _, log = process.communicate(timeout=15)
        responder.close()
    assert "PRIVATE KEY" not in log


def settings(state: Path) -> MqttSettings:
    return MqttSettings.from_config(load_config(state / "config.toml"))


def test_the_broker_s_name_is_checked(state) -> None:
    assert diagnose(settings(state)) == ""
    # The same broker with the same certificate, which is for localhost and 127.0.0.1 only.
    assert "IP address mismatch" in diagnose(replace(settings(state), host="127.0.0.2"))


def test_a_broker_of_another_authority_is_not_trusted(state, tmp_path) -> None:
    other = Authority.init(tmp_path / "other", "stranger", datetime.now(UTC))
    (state / "tls" / "ca.pem").write_bytes(other.certificate_pem)
    transport = MqttTransport(settings(state))
    transport.start()
    with pytest.raises(NetworkError, match="certificate was not accepted"):
        transport.wait_connected(1.0)
    transport.stop()


def test_a_certificate_of_another_authority_does_not_get_in(state, tmp_path) -> None:
    other = Authority.init(tmp_path / "other", "stranger", datetime.now(UTC)).issue_server(tmp_path, datetime.now(UTC))
    files = TlsFiles(state / "tls" / "ca.pem", other.certificate, other.key)
    transport = MqttTransport(replace(settings(state), tls=files))
    transport.start()
    with pytest.raises(NetworkError) as caught:
        transport.wait_connected(1.5)
    transport.stop()
    assert "TLS" in caught.value.why or "closed" in caught.value.why or "reset" in caught.value.why
