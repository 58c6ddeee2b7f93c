"""A plant server, a real mosquitto with mutual TLS, and devices that speak plain MQTT 5 to it."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from kiridashi.artifacts import MANIFEST_NAME, describe_file
from kiridashi.budget import Budget
from kiridashi.enrolment import EnrolRequest, EnrolTicket
from kiridashi.manifest import Manifest, Preprocessing
from kiridashi.messages import Request, device_topic, encode
from kiridashi_server.fleet.broker import Broker, free_port
from kiridashi_server.fleet.connection import BrokerAddress, ClientFiles
from kiridashi_server.fleet.server import PlantServer
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

WAIT_S = 10.0


@dataclass
class TestDevice:
    """One device's keys and connection. ``messages`` are what was delivered, in order."""

    __test__ = False

    name: str
    files: ClientFiles
    address: BrokerAddress
    ticket: EnrolTicket | None = None
    messages: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    acks: dict[int, object] = field(default_factory=dict)
    granted: threading.Event = field(default_factory=threading.Event)
    acked: threading.Condition = field(default_factory=threading.Condition)
    client: mqtt.Client | None = None

    def connect(self, *topics: str) -> TestDevice:
        """Connect and subscribe; raises what the connection raises, or ConnectionRefusedError."""
        up, answered = threading.Event(), threading.Event()
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=f"{self.name}", protocol=mqtt.MQTTv5)
        context = ssl.create_default_context(cafile=str(self.files.authority))
        if self.files.certificate.exists():
            context.load_cert_chain(self.files.certificate, self.files.key)
        client.tls_set_context(context)
        client.on_socket_open = lambda c, u, s: s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def on_connect(_client, _data, _flags, reason, _properties):
            if not reason.is_failure:
                up.set()
            answered.set()

        client.on_connect = on_connect
        client.on_disconnect = lambda *_: answered.set()
        client.on_subscribe = lambda *_: self.granted.set()
        client.on_message = lambda c, u, message: self.messages.put(message)
        client.on_publish = self._on_publish
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 30
        client.connect(self.address.host, self.address.port, 20, clean_start=False, properties=properties)
        self.client = client
        client.loop_start()
        answered.wait(WAIT_S)
        if not up.is_set():
            self.close()
            raise ConnectionRefusedError("the broker did not accept")
        if topics:
            client.subscribe([(topic, 1) for topic in topics])
            assert self.granted.wait(WAIT_S)
        return self

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes = b"") -> str:
        """Publish with QoS 1 and return the reason of the acknowledgement."""
        mid = self.send(topic, payload, retain=retain, correlation=correlation)
        with self.acked:
            assert self.acked.wait_for(lambda: mid in self.acks, WAIT_S)
        return str(self.acks[mid])

    def send(self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes = b"") -> int:
        properties = Properties(PacketTypes.PUBLISH)
        if correlation:
            properties.CorrelationData = correlation
        return self.client.publish(topic, payload, qos=1, retain=retain, properties=properties).mid

    def ask(self, request: Request, correlation: bytes) -> None:
        self.send(device_topic(self.name, "rpc"), encode(request), correlation=correlation)

    def next(self, timeout_s: float = WAIT_S) -> mqtt.MQTTMessage:
        return self.messages.get(timeout=timeout_s)

    def reply(self, request: Request) -> tuple[str, bytes]:
        """Ask once and wait for the answer with the same correlation data."""
        self.ask(request, b"only-one")
        message = self.next()
        assert message.topic == device_topic(self.name, "rx")
        assert message.properties.CorrelationData == b"only-one"
        return dict(message.properties.UserProperty)["status"], message.payload

    def close(self) -> None:
        if self.client is not None:
            self.client.disconnect()
            self.client.loop_stop()
            self.client = None

    def _on_publish(self, _client, _data, mid, reason, _properties) -> None:
        with self.acked:
            self.acks[mid] = reason
            self.acked.notify_all()


def make_request(folder: Path, name: str) -> EnrolRequest:
    """What a device would ask with; its TLS key goes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "device.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    seal = Ed25519PrivateKey.generate().public_key()
    return EnrolRequest(
        device=name,
        csr_pem=csr.public_bytes(serialization.Encoding.PEM).decode(),
        seal_public_key_pem=seal.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode(),
    )


def install_ticket(folder: Path, ticket: EnrolTicket) -> ClientFiles:
    """Write a ticket's certificates beside the key of :func:`make_request`."""
    files = ClientFiles(folder / "ca.pem", folder / "device.pem", folder / "device.key")
    files.authority.write_text(ticket.ca_pem)
    files.certificate.write_text(ticket.certificate_pem)
    return files


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlantServer]:
    """A plant server with the lines ``press-3`` and ``weld-1``, on a port of its own."""
    folder = tmp_path_factory.mktemp("plant")
    server = PlantServer.init(folder / "state", BrokerAddress("127.0.0.1", free_port()))
    server.add_line("press-3")
    server.add_line("weld-1")
    yield server
    server.close()


@pytest.fixture(scope="module")
def broker(plant: PlantServer) -> Iterator[Broker]:
    with plant.start_broker(kind="mosquitto") as broker:
        yield broker


@pytest.fixture
def device_request(tmp_path: Path) -> Callable[[str], EnrolRequest]:
    """Enrolment requests, each with new keys."""
    return lambda name: make_request(tmp_path / "requests" / name, name)


@pytest.fixture
def enrol_at(tmp_path: Path) -> Iterator[Callable[..., TestDevice]]:
    """Enrols a device of a name and lines at a plant server; connections are closed at the end."""
    devices = []

    def make(server: PlantServer, name: str, *lines: str) -> TestDevice:
        ticket = server.enrol(make_request(tmp_path / name, name), lines, replace=True)
        address = BrokerAddress(ticket.broker_host, ticket.broker_port)
        devices.append(TestDevice(name, install_ticket(tmp_path / name, ticket), address, ticket))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


@pytest.fixture
def enrol(plant: PlantServer, enrol_at: Callable[..., TestDevice]) -> Callable[..., TestDevice]:
    """Enrols a device at the module's plant server."""
    return lambda name, *lines: enrol_at(plant, name, *lines)


@pytest.fixture(scope="module")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a bundle folder whose artifact is ``size`` random bytes."""

    def make(line: str, version: int, size: int = 700_000) -> Path:
        folder = tmp_path_factory.mktemp(f"bundle-{line}-{version}")
        model = folder / "model.onnx"
        model.write_bytes(np.random.default_rng([len(line), version]).bytes(size))
        manifest = Manifest(
            line=line,
            version=version,
            task="pictograms",
            labels=("ok", "scratch"),
            backbone="net",
            backbone_fingerprint="sha256:0",
            layout_digest="sha256:0",
            plan_digest="sha256:0",
            parameters_dense=10,
            parameters_kept=5,
            preprocessing=Preprocessing(64, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            budget=Budget(memory_bytes=1 << 27),
            artifacts=(describe_file(model, "onnx-fp32"),),
        )
        (folder / MANIFEST_NAME).write_bytes(manifest.encode())
        return folder

    return make


@pytest.fixture
def next_bundle(plant: PlantServer, make_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """A bundle of the version after the newest that the module's plant server has published."""

    def make(line: str, size: int = 700_000) -> Path:
        return make_bundle(line, len(plant.registry.releases(line)) + 1, size)

    return make
