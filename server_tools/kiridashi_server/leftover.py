"""Processes that a killed run of ours left behind: known by a file with their id, ended before the next run starts."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from kiridashi.errors import StateError

_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.02


def stop_leftover(pid_file: Path, folder: Path) -> None:
    """End the process of an earlier run, if it is still there: politely, then by force.

    Args:
        pid_file: holds its process id; a file that is missing or holds anything else means that there is none.
        folder: a folder that its command line names, so that another process with the same id is left alone.

    Raises:
        StateError: it does not end.
    """
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return
    if not _runs_in(folder, pid):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if not _runs_in(folder, pid):
                return
            time.sleep(_POLL_S)
    raise StateError(
        f"a process of an earlier run ({pid}) does not end", why=f"it uses the folder {folder}", next_step=f"kill {pid}"
    )


def _runs_in(folder: Path, pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(word == str(folder) or word.startswith(f"{folder}/") for word in words)
