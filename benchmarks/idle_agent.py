"""The agent's resident process at rest, as installed: enrolled, connected over mutual TLS, one line active."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiridashi_agent.machine import resident_bytes

_SERVER, _AGENT = "kiridashi_server.cli", "kiridashi_agent.cli"
_DEVICE = "bench-1"
_LIMIT_S = 240.0


@dataclass(frozen=True)
class Idle:
    """``rss_bytes``, ``cpu_share`` of one core over ``seconds`` at rest, and ``rss_reported``, the agent's own word."""

    rss_bytes: int
    rss_reported: int
    cpu_share: float
    seconds: float


def idle_agent(bundle: Path, line: str, folder: Path, seconds: float) -> Idle:
    """Start a plant server and an agent, wait until ``bundle`` is active, let the agent rest, and read ``/proc``.

    Raises:
        RuntimeError: a command failed, or the line did not become active.
    """
    folder.mkdir(parents=True)
    server, device = folder / "server", folder / "device"
    call(_SERVER, "fleet", "init", "--host", "127.0.0.1", "--port", _free_port(), "--state", server)
    call(_SERVER, "line", "add", line, "--state", server)
    request, ticket = folder / "request.json", folder / "ticket.json"
    call(_AGENT, "enroll", "request", "--device", _DEVICE, "-o", request, "--state", device)
    call(_SERVER, "fleet", "enroll", request, "-o", ticket, "--lines", line, "--state", server)
    call(_AGENT, "enroll", "install", ticket, "--state", device)
    with running(folder / "server.log", _SERVER, "serve", "--with-broker", "--state", server) as serving:
        _until(lambda: "stop with Ctrl-C" in (folder / "server.log").read_text(), serving)
        call(_SERVER, "publish", bundle, "--line", line, "--state", server)
        with running(folder / "agent.log", _AGENT, "run", "--state", device) as agent:
            pointer = device / "lines" / line / "active.json"
            _until(pointer.is_file, agent)
            time.sleep(min(5.0, seconds))
            before = _cpu_s(agent.pid)
            time.sleep(seconds)
            used = _cpu_s(agent.pid) - before
            rss = resident_bytes(Path(f"/proc/{agent.pid}/status"))
            shown = call(_SERVER, "fleet", "show", _DEVICE, "--state", server)
    return Idle(rss, int(shown["reported"]["idle_rss_bytes"]), used / seconds, seconds)


def call(program: str, *words: object) -> dict[str, Any]:
    """Run one command with ``--json``; raises RuntimeError if it fails."""
    command = [*_command(program, *words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} {' '.join(map(str, words))} failed: {done.stderr or done.stdout}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@contextmanager
def running(log: Path, program: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background, stopped at the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(_command(program, *words), stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


def _command(program: str, *words: object) -> list[str]:
    return [sys.executable, "-c", f"import sys; from {program} import main; sys.exit(main())", *map(str, words)]


def _until(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("a program ended, or did not do in time, what was waited for; see its log")
        time.sleep(0.1)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
