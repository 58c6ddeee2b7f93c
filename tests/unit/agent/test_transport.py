"""The window of outstanding requests: order, retries, deadlines, and what is not retried."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from kiridashi.errors import NetworkError
from kiridashi.messages import Request
from kiridashi_agent.transport import NotFoundError, RefusedError, exchange

SILENCE_S = 0.3


class Peer:
    """Answers from its own threads, so in any order; ``script`` gives an index's first outcomes."""

    def __init__(self, script=None) -> None:
        self.script = script or {}
        self.asked: list[int] = []
        self.open = self.most_open = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(8)

    def submit(self, request: Request) -> Future[bytes]:
        with self._lock:
            self.asked.append(request.index)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        return self._pool.submit(self._answer, request.index)

    def _answer(self, index: int) -> bytes:
        outcome = self.script[index].pop(0) if self.script.get(index) else None
        time.sleep(SILENCE_S if outcome == "silence" else 0.001 * (index % 3))
        with self._lock:
            self.open -= 1
        if isinstance(outcome, Exception):
            raise outcome
        return b"%d" % index


def ask(peer: Peer, count: int, timeout_s: float = 5.0) -> dict[int, bytes]:
    requests = [Request("chunk", sha256="0" * 64, index=index) for index in range(count)]
    answers = exchange(peer.submit, requests, window=4, timeout_s=timeout_s, attempts=3)
    return {request.index: data for request, data in answers}


def test_all_are_answered_whatever_the_order_and_never_more_than_a_window_is_open() -> None:
    peer = Peer()
    assert ask(peer, 20) == {index: b"%d" % index for index in range(20)}
    assert peer.most_open == 4
    assert sorted(peer.asked) == list(range(20))


def test_a_passing_failure_is_asked_again() -> None:
    peer = Peer({1: [NetworkError("lost"), NetworkError("lost")]})
    assert len(ask(peer, 20)) == 20
    assert peer.asked.count(1) == 3


def test_the_last_attempt_s_error_is_raised() -> None:
    with pytest.raises(NetworkError, match="gone for good"):
        ask(Peer({1: [NetworkError("a"), NetworkError("b"), NetworkError("gone for good")]}), 20)


@pytest.mark.parametrize("kind", [NotFoundError, RefusedError])
def test_a_final_answer_is_not_asked_again(kind) -> None:
    peer = Peer({2: [kind("no")]})
    with pytest.raises(kind):
        ask(peer, 20)
    assert peer.asked.count(2) == 1


def test_a_request_without_an_answer_is_asked_again_after_its_deadline() -> None:
    peer = Peer({2: ["silence"]})
    assert len(ask(peer, 20, timeout_s=0.1)) == 20
    assert peer.asked.count(2) == 2


def test_silence_for_good_names_what_was_asked() -> None:
    peer = Peer({2: ["silence"] * 3})
    with pytest.raises(NetworkError, match="no answer to the request for chunk '000000000000'"):
        ask(peer, 20, timeout_s=0.1)


def test_leaving_early_gives_up_what_is_open() -> None:
    futures: list[Future[bytes]] = []

    def submit(_request: Request) -> Future[bytes]:
        futures.append(Future())
        if len(futures) == 1:
            futures[0].set_result(b"x")
        return futures[-1]

    answers = exchange(submit, [Request("chunk", index=n) for n in range(4)], window=4, timeout_s=5.0)
    next(answers)
    answers.close()
    assert [future.cancelled() for future in futures] == [False, True, True, True]
