"""A broker of our own for the quickstart, for tests and for small plants: mosquitto, else the one from a wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from kiridashi.artifacts import write_atomic
from kiridashi.errors import MissingExtraError, NetworkError

from kiridashi_server.fleet.connection import BrokerAddress, ClientFiles
from kiridashi_server.fleet.keys import private_folder
from kiridashi_server.fleet.mosquitto import MAX_PACKET_BYTES, MosquittoSettings, write_mosquitto_config
from kiridashi_server.leftover import stop_leftover

BrokerKind = Literal["mosquitto", "iotcore"]
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
_POLL_S = 0.02
_PORT_ATTEMPTS = 5
_DESCRIPTIONS: dict[BrokerKind, str] = {
    "mosquitto": "mosquitto with mutual TLS and an access list: every device is held to its own topics",
    "iotcore": (
        "iotcore, a broker from a Python wheel, because mosquitto is not installed. It encrypts and proves the "
        "broker's identity, but it does NOT check device certificates, has NO access list and forgets everything "
        "at a restart: for trying things out on this machine only. Models are still signed. "
        "For a plant: apt install mosquitto"
    ),
}


@dataclass
class Broker:
    """A running broker process. Stop it with :meth:`stop`, or use it as a context manager."""

    kind: BrokerKind
    address: BrokerAddress
    folder: Path
    tls: ClientFiles
    _process: subprocess.Popen[bytes] = field(repr=False)

    @classmethod
    def start(
        cls,
        folder: Path,
        tls: ClientFiles,
        *,
        port: int = 0,
        bind: str = LOOPBACK,
        kind: BrokerKind | None = None,
    ) -> Broker:
        """Start a broker and return once it accepts connections.

        A broker that an earlier, killed process left behind in the same folder is stopped first.

        Args:
            folder: for configuration, log and persistent data.
            tls: the authority's certificate, and certificate and key of the broker.
            port: 0 takes a free one.
            bind: address to listen on.
            kind: ``None`` takes mosquitto where it is installed, else iotcore.

        Raises:
            MissingExtraError: neither is installed.
            NetworkError: it ended or did not accept in time; with the last lines of its log.
            StateError: the broker that was left behind does not end.
        """
        kind = kind or installed_kind()
        private_folder(folder)
        stop_leftover(folder / "broker.pid", folder)
        attempts = 1 if port else _PORT_ATTEMPTS
        for attempt in range(1, attempts + 1):
            address = BrokerAddress(bind, port or free_port(bind))
            broker = cls(kind, address, folder, tls, _launch(kind, folder, tls, address))
            try:
                broker._wait_until_accepting()
            except NetworkError as error:
                broker.stop()
                # Between choosing a free port and listening on it, somebody else may have taken it.
                if attempt == attempts or "in use" not in error.why:
                    raise
            else:
                return broker
        raise NetworkError(f"no broker could be started in {folder}")

    @property
    def description(self) -> str:
        """What it protects and what it does not, in words for the user."""
        return f"{_DESCRIPTIONS[self.kind]} ({self.address})"

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def stop(self) -> None:
        """End the process, first politely; calling it twice is fine."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        (self.folder / "broker.pid").unlink(missing_ok=True)

    def check_alive(self) -> None:
        """Raise :class:`NetworkError`, with the last lines of the log, if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise NetworkError(
                f"the broker {self.kind} at {self.address} ended with code {code}",
                why=self._log_tail() or "its log is empty",
                next_step=f"see {self.folder / 'broker.log'}",
            )

    def __enter__(self) -> Broker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_accepting(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check_alive()
            if self._answers_as_ours():
                return
            time.sleep(_POLL_S)
        raise NetworkError(
            f"the broker {self.kind} does not accept connections at {self.address}",
            why=self._log_tail() or f"nothing within {START_TIMEOUT_S:g} s",
        )

    def _answers_as_ours(self) -> bool:
        """Whether a broker with a certificate of our authority listens, and not somebody else on the same port."""
        context = ssl.create_default_context(cafile=str(self.tls.authority))
        context.check_hostname = False  # the address may be one that only the plant's name server knows by name
        host = LOOPBACK if self.address.host in ("", "0.0.0.0") else self.address.host  # noqa: S104
        try:
            with socket.create_connection((host, self.address.port), timeout=1.0) as plain:
                context.wrap_socket(plain).close()
        except OSError:
            return False
        return True

    def _log_tail(self) -> str:
        text = (self.folder / "broker.log").read_text(errors="replace")
        return " | ".join(text.splitlines()[-8:])


def installed_kind() -> BrokerKind:
    """Which broker can be started here: mosquitto before iotcore.

    Raises:
        MissingExtraError: none is installed.
    """
    if _mosquitto_program():
        return "mosquitto"
    if importlib.util.find_spec("iotcore"):
        return "iotcore"
    raise MissingExtraError(
        "there is no broker on this machine",
        why="neither mosquitto nor the Python package iotcore is installed",
        next_step="apt install mosquitto, or pip install 'kiridashi[server]'",
    )


def free_port(bind: str = LOOPBACK) -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((bind, 0))
        port: int = probe.getsockname()[1]
        return port


def _mosquitto_program() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _launch(kind: BrokerKind, folder: Path, tls: ClientFiles, address: BrokerAddress) -> subprocess.Popen[bytes]:
    if kind == "mosquitto":
        # Started by root, mosquitto would change to an account that cannot read our key files.
        run_as = pwd.getpwuid(os.geteuid()).pw_name
        data = private_folder(folder / "data")
        settings = MosquittoSettings(address.port, tls, data, bind=address.host, run_as=run_as)
        command = [_mosquitto_program() or "mosquitto", "-c", str(write_mosquitto_config(folder, settings))]
    else:
        config = folder / "rumqttd.toml"
        write_atomic(config, _rumqttd_config(tls, address).encode())
        command = [sys.executable, "-m", "iotcore", "--config", str(config), "--log-level", "WARNING"]
    with (folder / "broker.log").open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    write_atomic(folder / "broker.pid", f"{process.pid}\n".encode())
    return process


def _rumqttd_config(tls: ClientFiles, address: BrokerAddress) -> str:
    # Small log segments: with the default ones a few pushed models keep 200 MiB resident.
    return f"""id = 0
[router]
id = 0
max_connections = 10000
max_outgoing_packet_count = 200
max_segment_size = 16777216
max_segment_count = 4
[v5.1]
name = "kiridashi"
listen = "{address}"
next_connection_delay_ms = 1
[v5.1.tls]
capath = "{tls.authority}"
certpath = "{tls.certificate}"
keypath = "{tls.key}"
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {MAX_PACKET_BYTES}
max_inflight_count = 100
"""
