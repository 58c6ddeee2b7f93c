"""The child's end of a job: one request in on standard input, one reply out, then the process ends.

``python -m kiridashi_agent.child JOB``, one of :data:`MODULES`. Limits are set before anything heavy is imported.
Libraries print to standard output, in Python and in C: the reply goes over a private copy of that descriptor, and
everything else that writes to it lands on standard error. When the agent dies its end of standard input closes, and so
does this process.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from kiridashi.errors import KiridashiError

MODULES = {
    "probe": "kiridashi_agent.probe",
    "accuracy": "kiridashi_agent.accuracy",
    "measure": "kiridashi_agent.measure",
    "interleave": "kiridashi_agent.interleave",
    "tune": "kiridashi_agent.finetune",
    "survey": "kiridashi_agent.survey",
    "watch": "kiridashi_agent.watch",
}
MAX_REQUEST_BYTES = 64 * 1024
_STDIN = 0
_OOM_FIRST = "1000"


class Call(msgspec.Struct, frozen=True):
    """A request with the limits that the child sets on itself before it works on it."""

    body: msgspec.Raw
    data_limit_bytes: int | None = None
    nice: int = 0


class Fault(msgspec.Struct, frozen=True):
    """An error on its way to the parent: the class's name and its three parts."""

    kind: str
    what: str
    why: str = ""
    next_step: str = ""


class Reply(msgspec.Struct, frozen=True):
    """What the child answers: either ``ok``, the result's JSON, or ``fault``."""

    ok: msgspec.Raw = msgspec.Raw(b"null")
    fault: Fault | None = None


def main(argv: list[str]) -> int:
    """Serve one job; 0 when a reply was written, whatever it says."""
    replies = _take_over_stdout()
    call = msgspec.json.decode(_read_line(), type=Call)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit(call)
    reply = _answer(MODULES[argv[0]], call.body)
    with replies:
        replies.write(msgspec.json.encode(reply))
    return 0


def _answer(module_name: str, body: msgspec.Raw) -> Reply:
    try:
        module: Any = importlib.import_module(module_name)
        result = module.run(msgspec.json.decode(body, type=module.Request))
    except KiridashiError as error:
        return Reply(fault=Fault(type(error).__name__, error.what, error.why, error.next_step))
    except MemoryError as error:
        return Reply(fault=Fault("MemoryError", "the memory limit was reached", str(error)))
    return Reply(ok=msgspec.Raw(msgspec.json.encode(result)))


def _take_over_stdout() -> BinaryIO:
    private = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(private, "wb")


def _limit(call: Call) -> None:
    os.nice(call.nice)
    if call.data_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (call.data_limit_bytes, call.data_limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # When memory runs out, the kernel is to end this process: neither the agent nor a line that works.
    Path("/proc/self/oom_score_adj").write_text(_OOM_FIRST)


def _read_line() -> bytes:
    """The request, read from the descriptor itself: a thread waiting inside ``sys.stdin`` would hang the exit."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_REQUEST_BYTES:
        piece = os.read(_STDIN, MAX_REQUEST_BYTES)
        if not piece:
            break
        line += piece
    return line


def _end_with_parent() -> None:
    while os.read(_STDIN, 1):
        continue
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
