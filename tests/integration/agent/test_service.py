"""The agent as a service manager sees it: a real process, a real datagram socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from agent_program import BINARY, AgentProgram
from fake_fleet import free_port
from kiridashi.messages import Desired, LineDesired
from tiny_bundle import make_bundle

V1 = "lines/press-3/1.json"
WATCHDOG_S = 1.5


class Inbox:
    """What came in at a service manager's socket, with the time."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver

    def until(self, wanted: str, timeout_s: float = 20.0) -> str:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._receiver.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                message = self._receiver.recv(4096).decode()
            except TimeoutError:
                break
            if wanted in message:
                return message
        raise TimeoutError(wanted)

    def drain(self) -> None:
        self._receiver.setblocking(False)
        try:
            while self._receiver.recv(4096):
                continue
        except BlockingIOError:
            return


@contextmanager
def service(program: AgentProgram, address: str) -> Iterator[tuple[subprocess.Popen[str], Inbox]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0", 1))
        told = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
        process = subprocess.Popen(
            [*BINARY, "run", "--state", str(program.state)],
            env={**os.environ, **told, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield process, Inbox(receiver)
        finally:
            process.kill()
            process.wait()


def test_ready_alive_with_its_lines_and_stopping(program, responder, fleet, tmp_path) -> None:
    fleet.publish(tmp_path / "bundle", make_bundle(tmp_path / "bundle", version=1))
    with service(program, f"@kiridashi-{os.getpid()}-{program.port}") as (process, inbox):
        assert "STATUS=no line has a model" in inbox.until("READY=1")
        responder.want("cam-1", Desired(1, {"press-3": LineDesired(V1)}))
        assert inbox.until("STATUS=press-3 active 1", 60).startswith("WATCHDOG=1\n")
        process.send_signal(signal.SIGTERM)
        inbox.until("STOPPING=1")
        assert process.wait(15) == 0


def test_without_a_broker_it_is_ready_and_alive_all_the_same(tmp_path, fleet) -> None:
    program = AgentProgram(tmp_path / "state", free_port(), fleet)
    with service(program, str(tmp_path / "notify")) as (_, inbox):
        inbox.until("READY=1")
        for _ in range(3):
            inbox.until("WATCHDOG=1", WATCHDOG_S)


def test_a_loop_that_hangs_gives_no_sign_of_life(program, responder, tmp_path) -> None:
    with service(program, str(tmp_path / "notify")) as (process, inbox):
        inbox.until("WATCHDOG=1")
        # The loop reads the journal at every turn; reading this waits for a writer that never comes.
        os.mkfifo(program.state / "journal" / "press-9.line.json")
        time.sleep(WATCHDOG_S)
        inbox.drain()
        with pytest.raises(TimeoutError):
            inbox.until("WATCHDOG=1", 2 * WATCHDOG_S)
        assert process.poll() is None
