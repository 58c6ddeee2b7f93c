"""When the resident looks, what it tells, and that it tells it once."""

from __future__ import annotations

import threading

import msgspec
import pytest
from agent_program import wait_for
from kiridashi.config import BrokerSection, Config, DeviceSection, LimitsSection, LineSection
from kiridashi.drift.report import Finding, LineDrift
from kiridashi.drift.rows import Row, RowFile, RowFolder
from kiridashi.errors import NetworkError
from kiridashi_agent.jobs import WatchOutcome, WatchRequest
from kiridashi_agent.journal import Journal
from kiridashi_agent.process import JobCancelledError, JobTimeoutError, Limits
from kiridashi_agent.watching import WATCH_LOCK, DriftWatcher, look, watched_lines

FINDING = Finding("line", "image", "brightness", "lower", 0.001, 0.3, 0.9, 0.5, 0.2, 20, 400, 1.0, 2.0)
OTHER = msgspec.structs.replace(FINDING, signal="outputs", statistic="confidence")
CALM = LineDrift("watching", "sha256:m", 400, 400, 1, 900)


def drifted(*findings: Finding) -> LineDrift:
    return msgspec.structs.replace(CALM, findings=findings)


class Child:
    """A child that says what a test tells it to."""

    def __init__(self) -> None:
        self.says = WatchOutcome({"press-3": CALM})
        self.fails: Exception | None = None
        self.requests: list[WatchRequest] = []
        self.hangs = threading.Event()

    def __call__(self, request: WatchRequest, limits: Limits) -> WatchOutcome:
        self.requests.append(request)
        if self.hangs.is_set():
            assert limits.cancel is not None
            limits.cancel.wait(10)
            raise JobCancelledError("stopped")
        if self.fails is not None:
            raise self.fails
        return self.says


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "journal")


def config(tmp_path, every_s: float = 3600.0) -> Config:
    lines = {"press-3": LineSection(), "press-4": LineSection(watch=False)}
    limits = LimitsSection(watch_every_s=every_s)
    return Config(DeviceSection("cam-1", tmp_path), BrokerSection("127.0.0.1"), lines, limits)


def note(tmp_path, line: str = "press-3") -> None:
    RowFolder(tmp_path, line).add(RowFile("sha256:m", ("a",), (Row(0.0, 0, (1.0,)),)))


def test_each_finding_is_told_once(tmp_path, journal) -> None:
    child, events = Child(), []
    for says in (CALM, drifted(FINDING), drifted(FINDING), drifted(FINDING, OTHER)):
        child.says = WatchOutcome({"press-3": says})
        look(tmp_path, journal, {"press-3": 400}, child, lambda name, body: events.append((name, body)))
    assert [(name, body["line"], body["statistic"]) for name, body in events] == [
        ("drift", "press-3", "brightness"),
        ("drift", "press-3", "confidence"),
    ]
    assert events[0][1]["model"] == "sha256:m"
    assert journal.drift() == {"press-3": drifted(FINDING, OTHER)}


def test_a_new_model_that_drifts_alike_is_news(tmp_path, journal) -> None:
    child, events = Child(), []
    for digest in ("sha256:m", "sha256:n"):
        other = msgspec.structs.replace(FINDING, at_s=float(len(events) + 7))
        child.says = WatchOutcome({"press-3": msgspec.structs.replace(drifted(other), model_digest=digest)})
        look(tmp_path, journal, {"press-3": 400}, child, lambda _, body: events.append(body["model"]))
    assert events == ["sha256:m", "sha256:n"]


def test_a_lost_connection_does_not_lose_the_finding(tmp_path, journal, caplog) -> None:
    def offline(_name, _body) -> None:
        raise NetworkError("no broker")

    child = Child()
    child.says = WatchOutcome({"press-3": drifted(FINDING)}, {"press-5": "damaged"})
    look(tmp_path, journal, {"press-3": 400}, child, offline)
    assert journal.drift()["press-3"].findings == (FINDING,)
    assert "no broker" in caplog.text
    assert "press-5" in caplog.text


def test_lines_that_are_not_to_be_watched_are_not(tmp_path) -> None:
    assert watched_lines(config(tmp_path)) == {"press-3": 400}


def test_no_child_is_started_for_nothing_and_none_too_soon(tmp_path, journal) -> None:
    child = Child()
    note(tmp_path, "press-4")
    watcher = DriftWatcher(config(tmp_path), journal, child, lambda *_: None)
    watcher.go_on()
    watcher.pause()
    assert child.requests == []
    note(tmp_path)
    watcher.go_on()  # not due again yet
    watcher.pause()
    assert child.requests == []
    watcher = DriftWatcher(config(tmp_path, 0.01), journal, child, lambda *_: None)
    watcher.go_on()
    wait_for(lambda: journal.drift())
    watcher.pause()
    assert [request.lines for request in child.requests] == [{"press-3": 400}]


def test_a_look_that_was_interrupted_is_made_up_for_and_a_failed_one_is_not_fatal(tmp_path, journal, caplog) -> None:
    child = Child()
    note(tmp_path)
    watcher = DriftWatcher(config(tmp_path), journal, child, lambda *_: None)
    child.hangs.set()
    watcher.go_on()
    wait_for(lambda: child.requests)
    watcher.go_on()
    watcher.pause()
    assert len(child.requests) == 1
    child.hangs.clear()
    child.fails = JobTimeoutError("the drift watch did not end within 120 s")
    watcher.go_on()
    wait_for(lambda: len(child.requests) == 2)
    watcher.pause()
    assert "did not end" in caplog.text
    assert journal.drift() == {}


def test_a_look_by_hand_does_not_hold_up_the_agent(tmp_path, journal, caplog) -> None:
    child = Child()
    note(tmp_path)
    watcher = DriftWatcher(config(tmp_path), journal, child, lambda *_: None)
    with journal.lock(WATCH_LOCK, wait=False):
        watcher.go_on()
        watcher.pause()
    assert child.requests == []
    assert "in use by another process" in caplog.text
