"""Running one child process to its end: reply, time limit, memory limit, and what went wrong in words."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kiridashi.budget import MIB
from kiridashi.errors import ExitCode, KiridashiError

from kiridashi_agent.cage import Cage, MemoryLimit, open_cage

MAX_REPLY_BYTES = 1024 * 1024
STDERR_TAIL_BYTES = 4096
_POLL_S = 0.05
_RSS_POLL_S = 0.02
_PASSED_ON = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "KIRIDASHI_HARDWARE")
_ALLOCATION_FAILED = ("memoryerror", "bad_alloc", "allocate memory", "out of memory", "memory allocation")


class JobError(KiridashiError):
    """A child process did not give its result."""

    exit_code = ExitCode.MEASURE


class JobCrashedError(JobError):
    """The child ended by itself without a reply: a crash, a signal, or a defect."""


class JobTimeoutError(JobError):
    """The child was killed because it took too long."""


class JobCancelledError(JobError):
    """The child was killed because the caller asked for it."""

    exit_code = ExitCode.INTERRUPTED


class MemoryLimitError(JobError):
    """The child was killed, or an allocation failed, at its memory limit."""


@dataclass(frozen=True)
class Limits:
    """What a child may spend: wall seconds, resident bytes (``None``: no limit), and the event that cancels it."""

    seconds: float
    memory_bytes: int | None = None
    cancel: threading.Event | None = None


@dataclass
class _Watched:
    """A running child and what it has said so far."""

    process: subprocess.Popen[bytes]
    reply: bytearray
    stderr: bytearray
    over_memory: bool = False


def run_child(
    arguments: Sequence[str], compose: Callable[[MemoryLimit], bytes], limits: Limits, subject: str
) -> tuple[bytes, MemoryLimit]:
    """Run ``python -P ARGUMENTS…`` and return its reply and how memory was limited.

    Args:
        arguments: for the Python interpreter, for example ``["-m", "kiridashi_agent.child", "probe"]``.
        compose: gives the request's bytes once it is known how memory is limited.
        limits: time and memory.
        subject: what is worked on, for messages: ``"measuring press-3 model.onnx"``.

    Raises:
        JobError: one of its subclasses; the message names the subject, the limit and the last lines of stderr.
    """
    with open_cage(limits.memory_bytes) as cage:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,
        )
        child = _Watched(process, bytearray(), bytearray())
        try:
            cage.add(process.pid)
            _send(process.stdin, compose(cage.kind))
            _watch(child, limits, subject)
        finally:
            _end(process)
        return _conclude(child, limits, cage, subject), cage.kind


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _send(stdin: IO[bytes] | None, request: bytes) -> None:
    """Send the request and keep the pipe open: its closing tells the child that the agent has died."""
    if stdin is None:
        return
    try:
        stdin.write(request + b"\n")
        stdin.flush()
    except BrokenPipeError:
        # The child is gone already; its exit status and stderr say why.
        return


def _watch(child: _Watched, limits: Limits, subject: str) -> None:
    """Collect both outputs until the child closes them; stop at a limit.

    The resident set is watched whether or not the kernel enforces a limit of its own: a control group does not count
    shared pages that were in memory before, so what it lets pass would depend on what else has run.
    """
    deadline = time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        selector.register(_open(child.process.stdout), selectors.EVENT_READ, child.reply)
        selector.register(_open(child.process.stderr), selectors.EVENT_READ, child.stderr)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise _timeout(limits, subject, child)
            if limits.cancel is not None and limits.cancel.is_set():
                raise JobCancelledError(
                    f"{subject} was stopped",
                    why="something else goes first, or the program ends",
                )
            if limits.memory_bytes is not None and _resident_bytes(child.process.pid) > limits.memory_bytes:
                child.over_memory = True
                return
            for key, _ in selector.select(min(left, _RSS_POLL_S if limits.memory_bytes else _POLL_S)):
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fileobj)
                key.data.extend(piece)
            del child.stderr[:-STDERR_TAIL_BYTES]
            if len(child.reply) > MAX_REPLY_BYTES:
                raise JobCrashedError(f"{subject} failed", why=f"the reply is over {MAX_REPLY_BYTES} bytes")
    try:
        child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise _timeout(limits, subject, child) from None


def _open(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise JobError("a child process has no output pipe")
    return stream


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's process group, reap the child and close the pipes."""
    with contextlib.suppress(ProcessLookupError):  # raised when the whole group has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # bytes that a dead child never read
                stream.close()


def _conclude(child: _Watched, limits: Limits, cage: Cage, subject: str) -> bytes:
    code = child.process.returncode
    said = child.stderr.decode(errors="replace").strip()
    failed_allocation = cage.kind == "rlimit" and any(text in said.lower() for text in _ALLOCATION_FAILED)
    if child.over_memory:
        raise over_memory(subject, limits, "its resident memory went over the limit")
    if cage.was_hit():
        raise over_memory(subject, limits, f"the kernel ended the child process ({cage.kind})")
    if code != 0 and failed_allocation:
        raise over_memory(subject, limits, f"an allocation failed ({cage.kind})")
    if code != 0 or not child.reply:
        raise JobCrashedError(
            f"{subject} failed: the child process {_how_it_ended(code)}",
            why=_last_lines(said) or "it wrote nothing to standard error",
        )
    return bytes(child.reply)


def over_memory(subject: str, limits: Limits, why: str) -> MemoryLimitError:
    """The error for a child that reached its memory limit."""
    allowed = f"its limit of {limits.memory_bytes / MIB:.0f} MiB" if limits.memory_bytes else "is free on this device"
    return MemoryLimitError(
        f"{subject} needs more memory than {allowed}",
        why=why,
        next_step="cut a smaller model, or allow more memory for the line",
    )


def _timeout(limits: Limits, subject: str, child: _Watched) -> JobTimeoutError:
    said = _last_lines(child.stderr.decode(errors="replace"))
    return JobTimeoutError(
        f"{subject} did not end within {limits.seconds:g} s and was killed",
        why=f"its last words: {said}" if said else "it said nothing",
    )


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was ended by SIGKILL, as the kernel does when memory runs out"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"left with exit code {code}"


def _last_lines(text: str, lines: int = 3) -> str:
    return " | ".join(text.strip().splitlines()[-lines:])


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0  # the child has ended
    return pages * resource.getpagesize()
