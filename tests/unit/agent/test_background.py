"""Work beside the agent's loop: interrupted on request, and its defects are heard of."""

import threading

import pytest
from kiridashi_agent.background import Background


def test_work_is_interrupted_and_waited_for():
    ended = threading.Event()

    def work(cancel: threading.Event) -> None:
        cancel.wait(10)
        ended.set()

    background = Background("test")
    assert not background.is_running()
    background.start(work)
    assert background.is_running()
    background.stop()
    assert ended.is_set()
    assert not background.is_running()


def test_the_next_work_is_not_born_interrupted():
    background, seen = Background("test"), []
    background.stop()
    background.start(lambda cancel: seen.append(cancel.is_set()))
    background.stop()
    assert seen == [False]


def test_a_defect_is_raised_once_to_who_stops_it():
    def work(cancel: threading.Event) -> None:
        raise ZeroDivisionError("defect")

    background = Background("test")
    background.start(work)
    with pytest.raises(ZeroDivisionError):
        background.stop()
    background.stop()
