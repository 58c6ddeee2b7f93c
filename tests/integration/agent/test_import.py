"""``kiridashi-agent import`` beside a running agent: real processes, a real broker."""

from __future__ import annotations

import fcntl
import os

import pytest
from agent_program import last_report, wait_for
from fake_stick import contents, write_file
from kiridashi.messages import Desired, LineDesired
from kiridashi.slots import LineSlots
from tiny_bundle import make_bundle

V1, V2 = "lines/press-3/1.json", "lines/press-3/2.json"


@pytest.fixture
def stick(fleet, tmp_path):
    for version in (1, 2):
        folder = tmp_path / f"bundle-{version}"
        fleet.publish(folder, make_bundle(folder, version=version, seed=version))
    return write_file(tmp_path / "stick.tar", contents(fleet, V2))


@pytest.fixture
def running(program, responder, stick):
    """An agent that serves version 1, as the server wants."""
    process = program.start()
    try:
        responder.want("cam-1", Desired(1, {"press-3": LineDesired(V1)}))
        wait_for(lambda: last_report(responder, "active"))
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=15)


def test_the_running_agent_reports_what_was_imported(program, responder, running, stick) -> None:
    code, found = program.call("import", str(stick))
    assert (code, found["phase"], found["version"]) == (0, "active", 2), found
    report = wait_for(
        lambda: (last := last_report(responder, "active")) and last.lines["press-3"].version == 2 and last
    )
    assert (report.generation, report.lines["press-3"].slot) == (1, "b")
    responder.want("cam-1", Desired(1, {"press-3": LineDesired(V1)}))  # as after a new connection
    responder.want("cam-1", Desired(2, {"press-3": LineDesired(V2)}))
    wait_for(lambda: responder.states[-1].generation == 2)
    assert LineSlots(program.state, "press-3").active().slot == "b"
    assert running.poll() is None


def test_a_line_that_is_worked_on_is_not_imported_to(program, running, stick) -> None:
    with (program.state / "journal" / "press-3.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, found = program.call("import", str(stick))
    assert (code, found["error"]["kind"]) == (60, "StateError")
    assert "in use by another process" in found["error"]["what"]
    assert LineSlots(program.state, "press-3").active().slot == "a"
    assert program.call("import", str(stick))[0] == 0


def test_a_line_that_is_not_here_is_named(program, fleet, stick, tmp_path) -> None:
    other = write_file(tmp_path / "other.tar", contents(fleet, V2, line="press-9"))
    code, found = program.call("import", str(other))
    assert (code, found["error"]["what"]) == (10, "this device has no line 'press-9'")
    assert "press-3" in found["error"]["why"]


def test_the_state_of_another_account_is_left_alone(program, stick) -> None:
    os.chown(program.state, 12345, -1)
    line = ("--line", "press-3")
    for command in (("import", str(stick)), ("undo", *line), ("tune", *line), ("drift", "--now"), ("label", *line)):
        check_refusal(*program.call(*command))


def check_refusal(code, found) -> None:
    assert (code, found["error"]["kind"]) == (60, "StateError")
    assert "sudo -u kiridashi" in found["error"]["next"]


def test_forgetting_takes_no_samples(program, running) -> None:
    code, found = program.call("tune", "--line", "press-3", "--forget", "--time", "5")
    assert (code, found["error"]["kind"]) == (10, "InputError")
