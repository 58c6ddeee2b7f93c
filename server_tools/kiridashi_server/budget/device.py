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
    command = [agent_command(), "measure", *map(str, files), "--threads", str(threads), "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"measuring {len(files)} files took more than {_TIMEOUT_S} s", why="the machine is overloaded"
        ) from error
    try:
        answer = json.loads(done.stdout)
        return tuple(msgspec.convert(row["measured"], Measurement) for row in answer["files"])
    except (ValueError, KeyError, TypeError) as error:
        why = done.stderr.strip() or f"it ended with code {done.returncode} and no result"
        raise DeviceError(f"the agent could not measure {', '.join(map(str, files))}", why=why) from error
