"""Copied onto an agent's PYTHONPATH by a test of faults: what ``faults.json`` beside it says happens to its processes.

python       children are started with this program instead of the interpreter (it preloads a library)
kill_phase   the process ends by SIGKILL once the journal says that a line is in this phase
in_job       ``[job, deed]``: a child that does ``job`` first does ``deed``, under the limits that it has set itself
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

_MOST_MIB = 1024


def _hang() -> None:
    time.sleep(3600)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _eat_memory() -> None:
    held = [bytearray(b"x" * (1 << 20)) for _ in range(_MOST_MIB)]
    raise RuntimeError(f"ate {len(held)} MiB and nobody minded")


def _run_out_of_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (100 << 20, 100 << 20))
    _eat_memory()


def _kill_in(phase: str) -> None:
    from kiridashi_agent.journal import Journal

    original = Journal.write_line

    def write_line(self, line, record):
        original(self, line, record)
        if record.state.phase == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.write_line = write_line


def _do_in_job(job: str, deed: str) -> None:
    if sys.orig_argv[-2:] != ["kiridashi_agent.child", job]:
        return
    original = importlib.import_module

    def import_module(name, package=None):
        DEEDS[deed]()
        return original(name, package)

    importlib.import_module = import_module


DEEDS = {"hang": _hang, "crash": _crash, "eat-memory": _eat_memory, "run-out-of-memory": _run_out_of_memory}
_wanted = json.loads(Path(__file__).with_name("faults.json").read_text())
if "python" in _wanted:
    sys.executable = _wanted["python"]
if "kill_phase" in _wanted:
    _kill_in(_wanted["kill_phase"])
if "in_job" in _wanted:
    _do_in_job(*_wanted["in_job"])
