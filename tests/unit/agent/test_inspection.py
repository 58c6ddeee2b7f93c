"""What the agent finds of its own state when it starts, and disks that fail while it works."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import msgspec
import pytest
from kiridashi.artifacts import write_atomic
from kiridashi_agent import agent as agent_module
from kiridashi_agent import health
from kiridashi_agent import journal as journal_module
from kiridashi_agent.inspection import inspected
from kiridashi_agent.journal import LineRecord
from kiridashi_agent.reporting import waits_for
from kiridashi_agent.trust_child import NoResultError

V1, V2 = "lines/press-3/1.json", "lines/press-3/2.json"


def restarted(device, target: str = V1, generation: int = 1):
    """A new process on the same folder, which hears the same wish; the line's state, and what it told meanwhile."""
    told = len(device.transport.events)
    device.restart()
    device.transport.want(generation, press_3=target)
    state = device.settle()
    return state, [(name, body.get("error"), body.get("message", "")) for name, body in device.transport.events[told:]]


def test_a_sound_device_has_nothing_to_tell(serving) -> None:
    assert restarted(serving)[1] == []
    assert serving.fleet.requests == []


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"active": "\xff"}', None, "folder"])
def test_a_lost_pointer_is_written_anew_from_the_journal(serving, damage) -> None:
    before = serving.slots.active()
    serving.slots.pointer_path.unlink()
    if damage == "folder":
        (serving.slots.pointer_path / "inside").mkdir(parents=True)
    elif damage is not None:
        serving.slots.pointer_path.write_bytes(damage)
    state, told = restarted(serving)
    assert serving.slots.active() == before
    assert (state.phase, state.error.kind) == ("active", "StateError")
    assert "written anew from the journal" in state.error.message
    assert [(name, kind) for name, kind, _ in told] == [("active", "StateError")]
    assert serving.fleet.requests == []
    assert restarted(serving)[1] == []  # told once


def test_pointer_and_journal_lost_together_are_begun_anew(serving) -> None:
    serving.slots.pointer_path.write_bytes(b"\0")
    (serving.state / "journal" / "press-3.line.json").write_bytes(b"\0")
    state, told = restarted(serving)
    assert (state.phase, state.version, state.error) == ("active", 1, None)
    assert told[0][:2] == ("idle", "StateError")
    assert "nothing serves" in told[0][2]


def test_a_lost_journal_still_tells_what_serves(serving) -> None:
    active = serving.slots.active()
    (serving.state / "journal" / "press-3.line.json").write_bytes(b"{")
    serving.restart()
    serving.agent.tick(0)
    line = serving.transport.states[-1].lines["press-3"]
    assert (line.phase, line.slot, line.model_digest) == ("idle", "a", active.model_digest)
    assert "was damaged" in line.error.message


@pytest.mark.parametrize("name", ["manifest.json", "served"])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_model_is_told_of_and_fetched_again(serving, name, damage) -> None:
    before = serving.slots.active()
    path = serving.slots.folder("a") / (before.artifact if name == "served" else name)
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(data[:50] + bytes([data[50] ^ 0x80]) + data[51:])
    state, told = restarted(serving)
    assert (state.phase, state.slot, state.error) == ("active", "b", None)
    assert serving.slots.active() == msgspec.structs.replace(before, slot="b")
    assert told[0][:2] == ("fetching", "StateError")
    assert "was damaged on the disk" in told[0][2]
    asked = serving.fleet.chunk_requests()
    if name == "served":  # what is sound is copied from the damaged slot
        assert len(asked) == 1
    assert restarted(serving)[1] == []


def test_a_damaged_model_under_a_refused_update_is_told_and_the_next_version_goes_on(serving) -> None:
    serving.jobs.fail = {"probe": RuntimeError("unused")}
    serving.fleet.intercept = lambda request, data: data[:-1] + b"?" if request.method == "chunk" else data
    serving.transport.want(2, press_3=V2)
    assert serving.settle().phase == "rejected"
    serving.fleet.intercept = lambda _request, data: data
    serving.jobs.fail = {}
    path = serving.slots.model_path(serving.slots.active())
    path.write_bytes(path.read_bytes()[:-1])
    state, _ = restarted(serving, V2, generation=2)
    assert (state.phase, state.slot) == ("rejected", "a")
    assert "was damaged on the disk" in state.error.message
    state, _ = restarted(serving, V2, generation=3)  # a later generation tries what was refused from outside
    assert (state.phase, state.slot) == ("active", "b")


class TestDamagedWithoutANetwork:
    """The damaged model cannot be fetched again now."""

    @pytest.fixture
    def damaged(self, serving):
        """Version 2 serves and is damaged on the disk; version 1 is the way back. The network is gone."""
        serving.transport.want(2, press_3=V2)
        assert serving.settle().slot == "b"
        path = serving.slots.model_path(serving.slots.active())
        path.write_bytes(path.read_bytes()[:-1])
        serving.transport.offline = True
        return serving

    def look(self, device) -> None:
        device.restart()
        device.agent.tick(0)

    def test_the_previous_model_serves_until_it_can_be_fetched(self, damaged) -> None:
        way_back = damaged.slots.previous()
        self.look(damaged)
        assert damaged.slots.active() == way_back
        record = damaged.journal.line("press-3")
        assert (record.state.phase, record.state.slot, record.damaged) == ("fetching", "a", False)
        assert record.state.model_digest == way_back.model_digest
        assert (record.state.error.kind, waits_for(record)) == ("NetworkError", "network")
        found = health.lines(damaged.config)
        assert (found.result, "press-3 waits for the network" in found.detail) == ("warning", True)

        damaged.transport.offline = False
        damaged.transport.want(2, press_3=V2)
        state = damaged.settle()
        assert (state.phase, state.version, state.slot, state.error) == ("active", 2, "b", None)
        assert health.lines(damaged.config).result == "ok"

    def test_without_a_sound_one_it_says_that_what_serves_is_damaged(self, damaged) -> None:
        before = damaged.slots.active()
        shutil.rmtree(damaged.slots.folder("a"))
        for _ in range(2):
            self.look(damaged)
        record = damaged.journal.line("press-3")
        assert (damaged.slots.active(), record.state.phase, record.damaged) == (before, "fetching", True)
        found = health.lines(damaged.config)
        assert (found.result, "damaged on the disk" in found.detail) == ("failed", True)

    def test_also_under_a_newer_wish(self, damaged) -> None:
        damaged.transport.want(3, press_3=V1)
        self.look(damaged)
        assert damaged.slots.active().slot == "a"

    def test_a_refused_one_gives_way_too(self, damaged) -> None:
        damaged.transport.offline = False
        damaged.fleet.intercept = lambda request, data: data[:-1] + b"?" if request.method == "target" else data
        self.look(damaged)
        assert (damaged.line.phase, damaged.slots.active().slot) == ("rejected", "a")


def test_what_killed_processes_left_is_cleared_away(serving) -> None:
    root, folder = serving.slots.root, serving.slots.folder("b")
    left = [
        root / ".active.json.1a2b3c4d.tmp",
        folder / ".manifest.json.1a2b3c4d.tmp",
        folder / "tuned.part" / "model.onnx",
        root / ".a.trash" / "model.onnx",
        serving.state / "journal" / ".device.json.1a2b3c4d.tmp",
        serving.state / "journal" / ".press-3.line.json.1a2b3c4d.tmp",
        serving.state / "journal" / ".press-3.tune.json.1a2b3c4d.tmp",
        serving.state / "trust" / ".seal.key.1a2b3c4d.tmp",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    restarted(serving)
    assert [path for path in left if path.exists()] == []
    assert not (root / ".a.trash").exists()


@pytest.mark.parametrize("name", ["active.json", "manifest.json"])
def test_a_shortage_of_the_system_is_no_damage(serving, monkeypatch, name) -> None:
    before, read = serving.slots.active(), Path.read_bytes

    def short(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.ENFILE, "Too many open files in system")
        return read(path)

    section = serving.config.lines["press-3"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", short)
        with pytest.raises(OSError, match="Too many open files"):
            inspected(LineRecord(), serving.slots, section, serving.trust.check_seal)
    assert serving.slots.active() == before


def test_a_seal_that_could_not_be_checked_is_not_a_damaged_one(serving) -> None:
    active = msgspec.structs.replace(serving.slots.active(), tuned=True)
    serving.slots.model_path(active).parent.mkdir()
    serving.slots.model_path(active).write_bytes(b"tuned")
    serving.slots.activate(active)
    record = serving.journal.line("press-3")
    record = msgspec.structs.replace(record, state=msgspec.structs.replace(record.state, tuned=True))

    def killed(*_arguments) -> None:
        raise NoResultError("the child process that checks signatures gave no result")

    assert inspected(record, serving.slots, serving.config.lines["press-3"], killed) is record


def test_a_line_that_others_hold_is_looked_at_later_and_interrupts_nothing_then(serving, monkeypatch) -> None:
    class Idle:
        pauses = 0

        def go_on(self) -> None:
            pass

        def is_open(self) -> bool:
            return False

        def pause(self) -> None:
            self.pauses += 1

    monkeypatch.setattr(agent_module, "INSPECT_AGAIN_S", 0.0)
    path = serving.slots.model_path(serving.slots.active())
    path.write_bytes(path.read_bytes()[:-1])
    serving.restart()
    idle = Idle()
    serving.agent._idle = (idle,)
    with serving.journal.lock("press-3", wait=False):
        for _ in range(3):
            serving.agent.tick(0)
    assert (serving.line.phase, idle.pauses) == ("active", 1)
    serving.transport.want(1, press_3=V1)
    assert serving.settle().slot == "b"


class TestFullDisk:
    @pytest.fixture
    def full(self, monkeypatch):
        """Whether the journal's disk is full; switched by the test."""
        switch = [True]

        def write(path, data, mode=0o644) -> None:
            if switch[0]:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write_atomic(path, data, mode)

        monkeypatch.setattr(journal_module, "write_atomic", write)
        return switch

    def test_the_agent_waits_reports_and_goes_on(self, serving, full) -> None:
        serving.transport.want(2, press_3=V2)
        for _ in range(3):
            serving.agent.tick(0)
        report = serving.transport.states[-1].lines["press-3"]
        assert (report.phase, report.slot, report.error.kind) == ("active", "a", "StateError")
        assert "No space left on device" in report.error.message
        with pytest.raises(Exception, match="No space left"):
            serving.agent.run_until_settled(0.05)
        full[0] = False
        state = serving.agent.run_until_settled(20).lines["press-3"]
        assert (state.phase, state.slot, state.error) == ("active", "b", None)

    def test_full_in_the_middle_of_an_update(self, serving, full) -> None:
        full[0] = False
        serving.jobs.before = lambda job: full.__setitem__(0, job == "measure")
        serving.transport.want(2, press_3=V2)
        serving.agent.tick(0)
        report = serving.transport.states[-1].lines["press-3"]
        assert (report.phase, report.slot) == ("measuring", "a")
        assert "No space left on device" in report.error.message
        serving.jobs.before, full[0] = None, False
        assert serving.agent.run_until_settled(20).lines["press-3"].phase == "active"
        assert serving.transport.states[-1].lines["press-3"].error is None
