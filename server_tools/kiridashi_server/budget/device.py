"""Asking a device to measure model files: the agent's own command, run where the device is.

The server never measures by itself: what counts is what the agent sees on the hardware that will serve the model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from kiridashi.budget import Measurement
from kiridashi.errors import ExitCode, KiridashiError
from kiridashi.probes import ProbeReport

_TIMEOUT_S = 300


class DeviceError(KiridashiError):
    """The agent's command could not be run, or it could not measure a file."""

    exit_code = ExitCode.MEASURE


def agent_command() -> str:
    """The ``kiridashi-agent`` command that belongs to this installation.

    Raises:
        DeviceError: it is not installed.
    """
    beside = Path(sys.executable).with_name("kiridashi-agent")
    found = str(beside) if beside.is_file() else shutil.which("kiridashi-agent")
    if found is None:
        raise DeviceError(
            "the command kiridashi-agent was not found",
            why="measurements are made by the device agent",
            next_step="pip install 'kiridashi[device]'",
        )
    return found


def measure_files(files: Sequence[Path], threads: int = 1) -> tuple[Measurement, ...]:
    """Measure ONNX or TFLite files with the agent on this machine, each in a fresh process.

    Raises:
        DeviceError: the agent refused or failed; its own message is passed on.
    """
    names = ", ".join(map(str, files))
    done = _measure([*map(str, files), "--threads", str(threads), "--once"], names, _TIMEOUT_S)
    try:
        answer = json.loads(done.stdout)
        return tuple(msgspec.convert(row["measured"], Measurement) for row in answer["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise _failed(done, names) from error


def measure_probe_set(folder: Path, *, threads: int = 1, seconds: float = 90.0) -> ProbeReport:
    """Have the agent on this machine measure the probe set in ``folder``, going on where an earlier call stopped.

    Raises:
        DeviceError: the agent refused or failed, or the time was too short.
    """
    arguments = ["--profile", str(folder), "--threads", str(threads), "--seconds", str(seconds)]
    done = _measure(arguments, str(folder), 2 * seconds + _TIMEOUT_S)
    try:
        return msgspec.json.decode(done.stdout, type=ProbeReport)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _failed(done, str(folder)) from error


def _measure(arguments: Sequence[str], what: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    command = [agent_command(), "measure", *arguments, "--json"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"measuring {what} took more than {timeout_s:g} s", why="the machine is overloaded"
        ) from error


def _failed(done: subprocess.CompletedProcess[str], what: str) -> DeviceError:
    why = done.stderr.strip() or f"it ended with code {done.returncode} and no result"
    return DeviceError(f"the agent could not measure {what}", why=why)
