"""``kiridashi-agent`` as a process of its own, and waiting for what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fake_fleet import FakeFleet, MqttResponder
from kiridashi.config import BrokerSection, Config, DeviceSection, LimitsSection, LineSection, render_config
from kiridashi.messages import Reported

BINARY = (sys.executable, "-c", "import sys; from kiridashi_agent.cli import main; sys.exit(main())")


class AgentProgram:
    """``kiridashi-agent`` over one state folder."""

    def __init__(self, state: Path, port: int, fleet: FakeFleet) -> None:
        self.state, self.port = state, port
        (state / "trust").mkdir(parents=True)
        (state / "trust" / "root.json").write_bytes(fleet.root)
        self.configure()

    def configure(self, job_timeout_s: float = 900.0, **line: Any) -> None:
        config = Config(
            DeviceSection("cam-1", self.state),
            BrokerSection("127.0.0.1", self.port),
            {"press-3": LineSection(**line)},
            LimitsSection(min(10.0, job_timeout_s), 0.5, job_timeout_s),
        )
        (self.state / "config.toml").write_text(render_config(config))

    def start(self, *arguments: str, python: Path = Path(sys.executable)) -> subprocess.Popen[str]:
        command = [str(python), *BINARY[1:], "run", "--state", str(self.state), "--json", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    def once(self, timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
        process = self.start("--once", "--timeout", str(timeout_s))
        out, err = process.communicate(timeout=timeout_s + 30)
        assert out, err
        return process.returncode, json.loads(out)

    def call(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        command = [*BINARY, *arguments, "--state", str(self.state), "--json"]
        return finished(command)


def finished(command: Sequence[str]) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0, error: type[Exception] = AssertionError) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise error("it did not happen in time")


def last_report(responder: MqttResponder, phase: str) -> Reported | None:
    found = [report for report in responder.states if report.lines["press-3"].phase == phase]
    return found[-1] if found else None
