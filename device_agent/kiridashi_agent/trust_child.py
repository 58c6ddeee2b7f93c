"""Checking signatures in a short-lived child process, so that the resident agent stays small.

python-tuf and its cryptography need a dozen megabytes that an agent has no use for while it waits. The child has no
connection: what it needs of the server it asks of its parent. Both ways, one JSON message a line: the order, then
questions and answers, then the result.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec
from kiridashi.errors import BundleError, KiridashiError, StateError, TrustError
from kiridashi.messages import MAX_MESSAGE_BYTES, Request

from kiridashi_agent.child import Fault
from kiridashi_agent.transport import NotFoundError

_LIMIT_S = 300.0
_MAX_LINE_BYTES = 16 * MAX_MESSAGE_BYTES
AskServer = Callable[[Request], bytes]


class FetchOrder(msgspec.Struct, frozen=True, tag="fetch"):
    """Bring the verified bytes of a target; see :func:`kiridashi_agent.tuf_client.fetch_target`."""

    folder: str
    root: bytes
    target: str


class SealOrder(msgspec.Struct, frozen=True, tag="seal"):
    """Check a tuned file's seal; see :func:`kiridashi.trust.check_tuned`."""

    state: str
    folder: str
    artifact: str
    parent: str
    digest: str


class _Question(msgspec.Struct, frozen=True, tag="question"):
    request: Request


class _Done(msgspec.Struct, frozen=True, tag="done"):
    data: bytes


class _Failed(msgspec.Struct, frozen=True, tag="failed"):
    fault: Fault


class NoResultError(StateError):
    """The child ended without a result, so nothing is known of what it was to check."""


class _Answer(msgspec.Struct, frozen=True):
    data: bytes = b""
    missing: str = ""


Order = FetchOrder | SealOrder
RunOrder = Callable[[Order, AskServer], bytes]


def carry_out(order: Order, ask: AskServer) -> bytes:
    """Do what ``order`` says in this process; raises as the functions it stands for."""
    if isinstance(order, FetchOrder):
        from kiridashi_agent.tuf_client import fetch_target

        return fetch_target(Path(order.folder), order.root, ask, order.target)
    from kiridashi.trust import check_tuned, load_public_key

    key = load_public_key(Path(order.state))
    check_tuned(Path(order.folder), order.artifact, order.parent, order.digest, key)
    return b""


def run_in_child(order: Order, ask: AskServer, limit_s: float = _LIMIT_S) -> bytes:
    """Have ``order`` carried out by a child process, killed after ``limit_s``; ``ask`` answers its questions here.

    Raises: what :func:`carry_out` and ``ask`` raise, and NoResultError when the child ends without a result.
    """
    command = [sys.executable, "-P", "-m", __name__]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    to_child, from_child = _pipe(child.stdin), _pipe(child.stdout)
    timer = threading.Timer(limit_s, child.kill)
    timer.start()
    try:
        return _converse(to_child, from_child, order, ask)
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        from_child.close()
        with contextlib.suppress(BrokenPipeError):  # what the dead child did not read is of no use
            to_child.close()


def _converse(to_child: IO[bytes], from_child: IO[bytes], order: Order, ask: AskServer) -> bytes:
    try:
        _send(to_child, order)
        while line := from_child.readline(_MAX_LINE_BYTES):
            said = msgspec.json.decode(line, type=_Question | _Done | _Failed)
            if isinstance(said, _Done):
                return said.data
            if isinstance(said, _Failed):
                raise _error(said.fault)
            try:
                answer = _Answer(data=ask(said.request))
            except NotFoundError as error:
                answer = _Answer(missing=str(error))
            _send(to_child, answer)
    except (BrokenPipeError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _no_result(str(error)) from error
    raise _no_result("it ended early; its last words are in the log")


def main() -> int:
    """The child: one order in, questions and answers, one result out."""
    to_parent, from_parent = sys.stdout.buffer, sys.stdin.buffer

    def ask(request: Request) -> bytes:
        _send(to_parent, _Question(request))
        answer = msgspec.json.decode(from_parent.readline(_MAX_LINE_BYTES), type=_Answer)
        if answer.missing:
            raise NotFoundError(answer.missing)
        return answer.data

    order = msgspec.json.decode(from_parent.readline(_MAX_LINE_BYTES), type=Order)
    tempfile.tempdir = order.folder  # python-tuf's own temporary files: elsewhere all may be read-only
    try:
        result: _Done | _Failed = _Done(carry_out(order, ask))
    except KiridashiError as error:
        result = _Failed(Fault(type(error).__name__, error.what, error.why, error.next_step))
    _send(to_parent, result)
    return 0


def _send(stream: IO[bytes], message: msgspec.Struct) -> None:
    stream.write(msgspec.json.encode(message) + b"\n")
    stream.flush()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise StateError("the child process that checks signatures has no pipe")
    return stream


def _error(fault: Fault) -> KiridashiError:
    kinds: dict[str, type[KiridashiError]] = {
        kind.__name__: kind for kind in (NotFoundError, TrustError, BundleError, StateError)
    }
    return kinds.get(fault.kind, StateError)(fault.what, why=fault.why, next_step=fault.next_step)


def _no_result(why: str) -> NoResultError:
    return NoResultError("the child process that checks signatures gave no result", why=why)


if __name__ == "__main__":
    sys.exit(main())
