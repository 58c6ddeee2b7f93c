"""What a person wants of a line goes before a tuning of it: undo and import do not wait for its end."""

from __future__ import annotations

import threading
import time
from functools import partial

import msgspec
import pytest
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.errors import StateError
from kiridashi.manifest import decode_manifest
from kiridashi.spool import Answer, AnswerLog, SpoolFolder
from kiridashi_agent import locks
from kiridashi_agent.cli.undo import undo
from kiridashi_agent.journal import Journal
from kiridashi_agent.locks import MakesWay
from kiridashi_agent.process import JobCancelledError
from kiridashi_agent.retune import LineTuner, TuneWish
from kiridashi_agent.tune_worker import TuneWorker

LINE = "press-3"
V2 = "lines/press-3/2.json"


@pytest.fixture
def twice(serving):
    """Version 2 serves, version 1 is the way back, and enough frames are named for a tuning."""
    serving.transport.want(2, press_3=V2)
    assert serving.settle().phase == "active"
    serving.set_line(tune_after=2)
    log = AnswerLog(SpoolFolder(serving.state, LINE).answers_path)
    for number in range(2):
        log.add(Answer(f"a{number}", f"u-{number}", "class", 1.0, "dent"))
    return serving


@pytest.fixture
def tuning(twice):
    """A tuning by itself that goes on until it is told to end; then it takes what a child takes to be killed."""
    begun = threading.Event()

    def slow(_request, limits):
        begun.set()
        assert limits.cancel.wait(20)
        raise JobCancelledError("stopped")

    twice.original, twice.jobs.tune = twice.jobs.tune, slow
    tuner = LineTuner(twice.config, Journal(twice.state / "journal"), twice.trust, twice.jobs, lambda: twice.runtimes)
    twice.worker = TuneWorker(twice.config, twice.journal, tuner)
    twice.worker.go_on()
    assert begun.wait(10)
    yield twice
    twice.worker.pause()


def ended(worker: TuneWorker) -> None:
    deadline = time.monotonic() + 10
    while worker._background.is_running():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_undo_does_not_wait_for_a_tuning(tuning) -> None:
    started = time.monotonic()
    back = undo(tuning.state, LINE, "previous")
    assert time.monotonic() - started < 5
    assert tuning.slots.active() == back
    ended(tuning.worker)
    record, state = tuning.journal.tuning(LINE), tuning.line
    assert (record.phase, record.is_to_be_repeated) == ("failed", False)
    assert (state.phase, state.slot) == ("rolled-back", back.slot)
    assert "it was undone before it was finished" in state.tuning


def test_what_was_undone_is_not_tuned_back_by_itself(tuning) -> None:
    undo(tuning.state, LINE, "previous")
    ended(tuning.worker)
    tuning.jobs.tune = tuning.original
    tuning.worker._retry_at.clear()
    assert not tuning.worker.is_open()


def test_an_import_does_not_wait_for_a_tuning_which_comes_back(tuning, fleet) -> None:
    active = tuning.slots.active()
    manifest = decode_manifest((tuning.slots.folder(active.slot) / MANIFEST_NAME).read_bytes())
    third = msgspec.structs.replace(manifest, version=3)
    fleet.publish(tuning.slots.folder(active.slot), third)
    tuning.jobs.tune = tuning.original  # that of the new bundle; the one under way is not ended by this
    state = tuning.agent.bring_in(LINE, "lines/press-3/3.json")
    assert (state.phase, state.version) == ("active", 3)
    ended(tuning.worker)
    assert tuning.journal.tuning(LINE).is_to_be_repeated
    tuning.worker.go_on()
    ended(tuning.worker)
    assert tuning.journal.tuning(LINE).phase == "done"


def test_no_tuning_begins_while_somebody_waits(twice) -> None:
    tuner = LineTuner(twice.config, twice.journal, twice.trust, twice.jobs, lambda: twice.runtimes)
    with twice.journal.lock_first(LINE), pytest.raises(StateError, match="is not tuned now"):
        tuner.tune(LINE, TuneWish("named"))
    assert twice.journal.tuning(LINE) is None
    assert not twice.journal.is_wanted(LINE)


def test_the_wait_is_bounded_and_the_message_says_so(twice, monkeypatch) -> None:
    monkeypatch.setattr(locks, "FIRST_S", 0.2)
    before = twice.slots.active()
    with twice.journal.lock(LINE, wait=False), pytest.raises(StateError, match=r"did not let go of it within 0\.2 s"):
        undo(twice.state, LINE, "previous")
    assert twice.slots.active() == before
    assert not twice.journal.is_wanted(LINE)


def test_making_way_also_ends_with_the_event_it_was_given() -> None:
    other, asked = threading.Event(), []
    makes_way = MakesWay(other, partial(asked.append, 1))
    assert not makes_way.is_set()
    assert not makes_way.wait(0.05)
    other.set()
    assert makes_way.is_set()
    assert len(asked) == 1
