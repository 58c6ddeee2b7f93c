"""How the agent talks to the fleet: the interface, and the window of outstanding requests over it.

The device drives: it never has more than a window of requests open, each has a deadline, and a request
without an
answer is asked again. So nothing here needs the broker to queue, to keep a session or to limit anybody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from kiridashi.errors import NetworkError
from kiridashi.messages import Desired, Reported, Request

from kiridashi_agent.process import JobCancelledError

ATTEMPTS = 4
Submit = Callable[[Request], "Future[bytes]"]


class NotFoundError(NetworkError):
    """The server answered that it does not have what was asked for."""


class RefusedError(NetworkError):
    """The broker or the server does not allow this device what it asked for."""


class Requests(Protocol):
    """Asking the server."""

    def request_many(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        """Ask for all of ``requests``, a window at a time; yields the answers as they come, in any order.

        Raises:
            NotFoundError, RefusedError: the server's answer to one of them.
            NetworkError: no connection, or no answer after several attempts.
        """
        ...


class Transport(Requests, Protocol):
    """The agent's side of the wire."""

    def publish_state(self, reported: Reported) -> None:
        """Make ``reported`` the retained state. Without a connection, it is sent once there is one."""
        ...

    def publish_event(self, name: str, body: Mapping[str, Any]) -> None:
        """Send one audit event; at least once, in order, while the process lives."""
        ...

    def next_desired(self, timeout_s: float) -> Desired | None:
        """The latest desired state that was not returned yet, or ``None`` after the time."""
        ...


class Interruptible:
    """Requests that end with :class:`JobCancelledError` once ``cancel`` is set; it is asked after every answer."""

    def __init__(self, requests: Requests, cancel: threading.Event) -> None:
        self._requests = requests
        self._cancel = cancel

    def request_many(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        """See :meth:`Requests.request_many`."""
        for answer in self._requests.request_many(requests):
            yield answer
            if self._cancel.is_set():
                raise JobCancelledError("fetching was interrupted")


def request_one(transport: Requests, request: Request) -> bytes:
    """Ask for one thing; raises as :meth:`Requests.request_many`."""
    for _, data in transport.request_many([request]):
        return data
    raise NetworkError(f"the request for '{request.name or request.sha256}' ended without an answer")


@dataclass(frozen=True)
class _Ask:
    request: Request
    attempt: int
    deadline: float = 0.0


def exchange(
    submit: Submit, requests: Iterable[Request], *, window: int, timeout_s: float, attempts: int = ATTEMPTS
) -> Iterator[tuple[Request, bytes]]:
    """Keep up to ``window`` requests open until all are answered; the engine behind ``request_many``.

    ``submit`` sends one request and returns the future of its answer. A :class:`NetworkError` that is neither
    "not found" nor "refused", and a passed deadline, lead to a new attempt; the last one's error is raised.
    """
    fresh = (_Ask(request, attempt=1) for request in requests)
    again: list[_Ask] = []
    open_asks: dict[Future[bytes], _Ask] = {}
    try:
        while True:
            while len(open_asks) < window and (ask := again.pop() if again else next(fresh, None)):
                future = submit(ask.request)
                open_asks[future] = _Ask(ask.request, ask.attempt, time.monotonic() + timeout_s)
            if not open_asks:
                return
            nearest = min(ask.deadline for ask in open_asks.values())
            done, _ = wait(open_asks, max(0.0, nearest - time.monotonic()), FIRST_COMPLETED)
            for future in done:
                ask = open_asks.pop(future)
                error = future.exception()
                if error is None:
                    yield ask.request, future.result()
                else:
                    again.append(_next_attempt(ask, error, attempts))
            for future, ask in list(open_asks.items()):
                if ask.deadline <= time.monotonic() and not future.done():
                    future.cancel()
                    del open_asks[future]
                    again.append(_next_attempt(ask, _no_answer(ask.request, timeout_s), attempts))
    finally:
        for future in open_asks:
            future.cancel()


def _next_attempt(ask: _Ask, error: BaseException, attempts: int) -> _Ask:
    transient = isinstance(error, NetworkError) and not isinstance(error, NotFoundError | RefusedError)
    if not transient or ask.attempt >= attempts:
        raise error
    return _Ask(ask.request, ask.attempt + 1)


def _no_answer(request: Request, timeout_s: float) -> NetworkError:
    return NetworkError(
        f"no answer to the request for {request.method} '{request.name or request.sha256[:12]}'",
        why=f"{timeout_s:g} s passed",
        next_step="check that the fleet server runs (kiridashi serve) and reaches the same broker",
    )
