"""A fleet server in a dictionary, for the agent's tests: signed metadata, manifests and chunks, by the wire contract.

``FakeFleet`` holds what a server would; tests change its state and watch the device. ``DirectTransport`` is the
agent's transport without a network; ``MqttResponder`` answers over a real broker.
"""

from __future__ import annotations

import getpass
import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from kiridashi.artifacts import iter_chunks
from kiridashi.errors import NetworkError
from kiridashi.manifest import Manifest
from kiridashi.messages import (
    RPC_FILTER,
    STATUS_PROPERTY,
    Desired,
    LineDesired,
    ProbesDesired,
    Reported,
    Request,
    decode,
    device_of,
    device_topic,
    encode,
    probes_path,
    target_path,
)
from kiridashi.probes import ProbeReport, ProbeSet, decode_probe_report
from kiridashi_agent.transport import NotFoundError, RefusedError, exchange
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

ROLES = ("root", "timestamp", "snapshot", "targets")
Intercept = Callable[[Request, bytes], bytes]


class FakeFleet:
    """Everything a server would hold. ``intercept`` may change any answer: that is the attacker."""

    def __init__(self) -> None:
        self.metadata: dict[str, bytes] = {}
        self.targets: dict[str, bytes] = {}
        self.blobs: dict[str, list[bytes]] = {}
        self.requests: list[Request] = []
        self.reports: list[tuple[int, ProbeReport]] = []
        self.refuses_reports = ""
        self.intercept: Intercept = lambda _request, data: data
        self._signers = {role: CryptoSigner.generate_ed25519() for role in ROLES}
        self._expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
        self._targets = Targets(version=1, expires=self._expires)
        self._version = 0
        root = Root(version=1, expires=self._expires, consistent_snapshot=True)
        for role, signer in self._signers.items():
            root.add_key(signer.public_key, role)
        self.root = self._sign("root", root)
        self.commit()

    def commit(self, expires: datetime | None = None) -> None:
        """Sign the present targets as the next version of everything below root."""
        self._version += 1
        until = expires or self._expires
        self._targets.version = self._version
        self._targets.expires = until
        snapshot = Snapshot(self._version, expires=until, meta={"targets.json": MetaFile(self._version)})
        timestamp = Timestamp(self._version, expires=until, snapshot_meta=MetaFile(self._version))
        self.metadata[f"{self._version}.targets.json"] = self._sign("targets", self._targets)
        self.metadata[f"{self._version}.snapshot.json"] = self._sign("snapshot", snapshot)
        self.metadata["timestamp.json"] = self._sign("timestamp", timestamp)

    def publish(self, folder: Path, manifest: Manifest) -> str:
        """Sign a bundle's manifest and take its files in; returns the target path."""
        files = [(folder / artifact.name, artifact.sha256) for artifact in manifest.artifacts]
        return self._publish(target_path(manifest.line, manifest.version), manifest.encode(), files)

    def publish_probes(self, folder: Path, probes: ProbeSet) -> str:
        """Sign a probe set and take its files in; returns the target path."""
        files = [(folder / graph.artifact.name, graph.artifact.sha256) for graph in probes.graphs]
        return self._publish(probes_path(probes.digest), probes.encode(), files)

    def _publish(self, path: str, data: bytes, files: Iterable[tuple[Path, str]]) -> str:
        self._targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        parent, _, name = path.rpartition("/")
        self.targets[f"{parent}/{hashlib.sha256(data).hexdigest()}.{name}"] = data
        for file, sha256 in files:
            self.blobs[sha256] = list(iter_chunks(file))
        self.commit()
        return path

    def answer(self, request: Request) -> tuple[str, bytes]:
        """Status and payload, as they go over the wire."""
        self.requests.append(request)
        match request.method:
            case "metadata":
                data = self.metadata.get(request.name)
            case "target":
                data = self.targets.get(request.name)
            case "chunk":
                chunks = self.blobs.get(request.sha256, [])
                data = chunks[request.index] if request.index < len(chunks) else None
            case "report":
                if self.refuses_reports:
                    return "refused", self.refuses_reports.encode()
                self.reports.append((request.index, decode_probe_report(bytes(request.body))))
                data = b""
        return ("not-found", b"there is no such thing") if data is None else ("ok", self.intercept(request, data))

    def chunk_requests(self) -> list[tuple[str, int]]:
        """Every chunk that was asked for, in order."""
        return [(request.sha256, request.index) for request in self.requests if request.method == "chunk"]

    def _sign(self, role: str, signed: Any) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(self._signers[role])
        return metadata.to_bytes()


class DirectTransport:
    """The agent's transport, answered at once by a :class:`FakeFleet` in the same process."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.fleet = fleet
        self.states: list[Reported] = []
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.offline = False
        self._desired: list[Desired] = []

    def want(self, generation: int, probes: ProbesDesired | None = None, **lines: str) -> None:
        """Make ``lines`` (name with ``_`` for ``-``, to target path) and ``probes`` the desired state."""
        wanted = {line.replace("_", "-"): LineDesired(target) for line, target in lines.items()}
        self._desired.append(Desired(generation, wanted, probes=probes))

    def request_many(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        return exchange(self._submit, requests, window=4, timeout_s=5.0)

    def publish_state(self, reported: Reported) -> None:
        self.states.append(reported)

    def publish_event(self, name: str, body: Mapping[str, Any]) -> None:
        self.events.append((name, body))

    def next_desired(self, timeout_s: float) -> Desired | None:
        return self._desired.pop(0) if self._desired else None

    def _submit(self, request: Request) -> Future[bytes]:
        if self.offline:
            raise NetworkError("the broker is not there")
        future: Future[bytes] = Future()
        status, data = self.fleet.answer(request)
        errors = {"not-found": NotFoundError, "refused": RefusedError, "error": NetworkError}
        if status == "ok":
            future.set_result(data)
        else:
            future.set_exception(errors[status](data.decode()))
        return future


class MqttResponder:
    """Answers a fleet's requests over a broker; ``delay_s`` throttles every chunk."""

    def __init__(self, fleet: FakeFleet, port: int, delay_s: float = 0.0) -> None:
        self.fleet = fleet
        self.delay_s = delay_s
        self.states: list[Reported] = []
        self.seen: list[tuple[str, bytes]] = []
        self._ready = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="responder", protocol=paho.MQTTv5)
        self._client.on_socket_open = lambda _c, _u, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._on_message
        self._client.connect_async("127.0.0.1", port)
        self._client.loop_start()
        if not self._ready.wait(10):
            raise NetworkError("the test's broker cannot be reached")

    def want(self, device: str, desired: Desired) -> None:
        self.publish(device_topic(device, "desired"), encode(desired), retain=True)

    def publish(self, topic: str, data: bytes, *, retain: bool = False, **properties: Any) -> None:
        attached = Properties(PacketTypes.PUBLISH)
        for name, value in properties.items():
            setattr(attached, name, value)
        self._client.publish(topic, data, qos=1, retain=retain, properties=attached)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        options = SubscribeOptions(qos=1)
        client.subscribe([(RPC_FILTER, options), ("kiri/v1/d/+/state", options), ("kiri/v1/d/+/evt/+", options)])

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        self.seen.append((message.topic, bytes(message.payload)))
        if message.topic.endswith("/state"):
            self.states.append(decode(bytes(message.payload), Reported))
        if not message.topic.endswith("/rpc"):
            return
        request = decode(bytes(message.payload), Request)
        if request.method == "chunk":
            time.sleep(self.delay_s)
        status, data = self.fleet.answer(request)
        self.publish(
            device_topic(device_of(message.topic), "rx"),
            data,
            CorrelationData=message.properties.CorrelationData,
            UserProperty=[(STATUS_PROPERTY, status)],
        )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def mosquitto(folder: Path, port: int, extra: str = "allow_anonymous true\n") -> Iterator[int]:
    """A broker of the test's own on loopback; killed by its pid at the end. Yields the pid."""
    configuration = folder / f"mosquitto-{port}.conf"
    configuration.write_text(f"user {getpass.getuser()}\nlistener {port} 127.0.0.1\nset_tcp_nodelay true\n{extra}")
    process = subprocess.Popen(
        ["/usr/sbin/mosquitto", "-c", str(configuration)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for_port(port)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _wait_for_port(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise NetworkError(f"nothing listens on port {port}")
