"""A plant and its devices through the installed commands only: ``kiridashi`` and ``kiridashi-agent`` as processes.

``Plant`` is a server folder with its own mosquitto (mutual TLS, loopback, a free port); ``Device`` is an enrolled
state folder. Every call is bounded in time, and what runs in the background is stopped by its process id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from agent_program import wait_for
from fake_fleet import free_port
from tiny_bundle import device_tiles, make_bundle

BIN = Path(sys.executable).parent
SERVER, AGENT = BIN / "kiridashi", BIN / "kiridashi-agent"
COMMAND_TIMEOUT_S = 120.0
Answer = tuple[int, dict[str, Any]]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command inherits: one thread per process, and nothing that would shadow the installed packages."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(extra or {})}


def call(
    program: Path, *words: object, env: Mapping[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
) -> Answer:
    """Run one command with ``--json``; its exit code and what it printed."""
    done = subprocess.run(
        [str(program), *map(str, words), "--json"],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(env),
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def succeed(program: Path, *words: object) -> dict[str, Any]:
    """Run one command that has to end with 0; what it printed."""
    code, data = call(program, *words)
    assert code == 0, data
    return data


@contextmanager
def background(command: Sequence[object], log: Path, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to ``log``, from the moment that it has written ``ready`` to the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=output, env=environment())
    try:
        wait_for(lambda: process.poll() is not None or ready in log.read_text(), timeout_s=60)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


class Plant:
    """A plant server's folder, made by ``kiridashi fleet init``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.state, self.port = folder, folder / "server", free_port()
        self.run("fleet", "init", "--host", "127.0.0.1", "--port", self.port)

    def run(self, *words: object) -> dict[str, Any]:
        """One ``kiridashi`` command on this plant that has to succeed."""
        return succeed(SERVER, *words, "--state", self.state)

    @contextmanager
    def serving(self, *command: object) -> Iterator[None]:
        """``kiridashi serve --with-broker``, or another server ``command``, for the time of the block."""
        words = command or (SERVER, "serve", "--with-broker", "--state", self.state)
        with ExitStack() as stack:
            stack.callback(self._stop_broker)
            stack.enter_context(background(words, self.folder / "serve.log", "stop with Ctrl-C"))
            yield

    def publish(self, bundle: Path, line: str = "press-3", *options: str) -> dict[str, Any]:
        return self.run("publish", bundle, "--line", line, *options)

    def enrol(self, name: str = "cam-1", line: str = "press-3", agent: Path = AGENT) -> Device:
        """A new device, through the files that a person would carry; it has no samples yet."""
        device = Device(self.folder / name, line, agent)
        request, ticket = self.folder / f"{name}.request", self.folder / f"{name}.ticket"
        device.succeed("enroll", "request", "--device", name, "-o", request)
        self.run("fleet", "enroll", request, "-o", ticket, "--lines", line)
        device.succeed("enroll", "install", ticket)
        return device

    def _stop_broker(self) -> None:
        """Stop a broker that outlived its server; the file is gone when the server has ended as it should."""
        pid = self.state / "broker" / "broker.pid"
        if pid.is_file():
            try:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pid.unlink()


class Device:
    """One device's state folder, and its ``kiridashi-agent``."""

    def __init__(self, state: Path, line: str, agent: Path) -> None:
        self.state, self.line, self.agent = state, line, agent

    def run(self, *words: object, env: Mapping[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Answer:
        """One ``kiridashi-agent`` command on this device."""
        return call(self.agent, *words, "--state", self.state, env=env, timeout_s=timeout_s)

    def succeed(self, *words: object) -> dict[str, Any]:
        return succeed(self.agent, *words, "--state", self.state)

    def tune_on(self, samples: Path) -> None:
        """Name the samples in the configuration, as a person edits it."""
        config = self.state / "config.toml"
        head = f"[lines.{self.line}]\n"
        text = config.read_text()
        assert text.count(head) == 1
        config.write_text(text.replace(head, f"{head}samples = {json.dumps(str(samples))}\n"))

    def once(self, timeout_s: float = 60, env: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """``run --once``; the exit code and the line's state."""
        longest_s = max(COMMAND_TIMEOUT_S, timeout_s + 60)
        code, report = self.run("run", "--once", "--timeout", timeout_s, env=env, timeout_s=longest_s)
        assert "lines" in report, report
        return code, report["lines"][self.line]

    def start(self) -> subprocess.Popen[bytes]:
        """``run --once`` in the background, for a test that kills it."""
        command = [self.agent, "run", "--once", "--state", self.state]
        with (self.state / "agent.log").open("wb") as log:
            return subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=environment())

    def predict(self, frames: Path) -> tuple[str, list[str]]:
        """The serving model's digest and its labels for an ``.npy`` batch."""
        seen = self.succeed("predict", "--line", self.line, frames)
        return seen["model_digest"], [row["label"] for row in seen["predictions"]]


def write_frames(path: Path, per_class: int = 4) -> list[int]:
    """Frames of the device's camera as an ``.npy`` batch; returns their true classes."""
    images, labels = device_tiles(per_class, seed=99)
    np.save(path, images)
    return [int(label) for label in labels]


@contextmanager
def killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Never leave ``process`` behind."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def bytes_on_disk(path: Path) -> int:
    """What a file really holds: a download reserves its whole length at once."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def wait_until_killed(process: subprocess.Popen[bytes], condition: Any, timeout_s: float) -> None:
    """SIGKILL ``process`` as soon as ``condition()`` holds.

    Raises:
        AssertionError: the process ended before, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "what it was to be killed in did not come"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def deliver(plant: Plant, device: Device, version: int) -> dict[str, Any]:
    """Publish a version and let the device take it, with the plant's server up only for that; the line's state."""
    make_bundle(plant.folder / f"bundle-{version}", version=version, seed=version)
    with plant.serving():
        plant.publish(plant.folder / f"bundle-{version}")
        code, line = device.once()
    assert (code, line["phase"], line["version"]) == (0, "active", version), line
    return line
