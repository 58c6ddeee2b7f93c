"""The systemd unit: well-formed, as closed as it says, and open enough for what the agent does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agent_program import BINARY
from kiridashi.messages import Desired, LineDesired
from tiny_bundle import make_bundle, write_device_samples

UNITS = Path(__file__).parents[3] / "packaging" / "systemd"
UNIT = UNITS / "kiridashi-agent.service"
NEWER_KEYS = ("RestartSteps", "RestartMaxDelaySec")
PR_SET_MDWE = 65
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@pytest.fixture(scope="module")
def settings() -> dict[str, list[str]]:
    rows = re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE)
    return {key: [value for name, value in rows if name == key] for key, _ in rows}


@needs_systemd
def test_the_unit_has_nothing_to_complain_about(tmp_path) -> None:
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/opt/kiridashi/bin/kiridashi-agent", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = [row for row in done.stderr.splitlines() if not any(f"'{key}'" in row for key in NEWER_KEYS)]
    assert said == []


@needs_systemd
def test_the_service_is_hardly_exposed(tmp_path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=17", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_watchdog_waits_longer_than_the_agent_may_be_silent(settings) -> None:
    # Four attempts at the longest answer that the configuration allows.
    assert settings["WatchdogSec"] == ["5min"]
    assert 4 * 60 < 5 * 60
    assert settings["Type"] == ["notify"]


@needs_systemd
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_every_system_call_of_an_update_is_allowed(program, responder, fleet, tmp_path, settings) -> None:
    folder = tmp_path / "bundle"
    fleet.publish(folder, make_bundle(folder, version=1))
    write_device_samples(tmp_path / "samples", per_class=12)
    program.configure(samples=tmp_path / "samples")
    responder.want("cam-1", Desired(1, {"press-3": LineDesired("lines/press-3/1.json")}))
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-o", str(trace), *BINARY, "run", "--once", "--json", "--state", program.state]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    line = json.loads(done.stdout)["lines"]["press-3"]
    assert (line["phase"], line["tune"] is not None) == ("active", True)
    used = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"openat", "execve", "renameat"} & used
    allow, deny = settings["SystemCallFilter"]
    assert used - members(allow) == set()
    assert used & members(deny.removeprefix("~")) == set()


def members(group: str) -> set[str]:
    """The system calls of one of systemd's groups, groups inside it included."""
    command = ["systemd-analyze", "syscall-filter", "--no-pager", group]
    rows = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")
    names = {row.strip() for row in rows if row.startswith("    ") and not row.strip().startswith("#")}
    return {call for name in names for call in (members(name) if name.startswith("@") else {name})}


def test_the_runtimes_need_no_memory_that_is_both_written_and_run(tmp_path) -> None:
    make_bundle(tmp_path)
    # Inherited by the processes that measure.
    denied = f"import ctypes, os; taken = ctypes.CDLL(None).prctl({PR_SET_MDWE}, 1, 0, 0, 0); "
    measure = "import sys; from kiridashi_agent.cli import main; sys.exit(main() if taken == 0 else 77)"
    files = [str(tmp_path / name) for name in ("model.onnx", "model.tflite")]
    command = [sys.executable, "-c", denied + measure, "measure", *files, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel cannot deny it (before 6.3)")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["files"]) == 2
