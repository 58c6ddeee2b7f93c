from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from kiridashi.drift.report import LineDrift
from kiridashi.errors import InputError, StateError
from kiridashi.messages import LineState
from kiridashi_agent import journal as module
from kiridashi_agent.journal import MAX_STRANGERS, DeviceRecord, Journal, LineRecord, UnreadError

RECORD = LineRecord(LineState(phase="tuning", target="lines/press-3/2.json", version=2), rollout="r1", chosen="m.onnx")


def test_a_fresh_journal_is_idle_and_empty(tmp_path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.line("press-3").state.phase == "idle"
    assert journal.device().generation == 0
    assert journal.lines() == {}


def test_records_come_back_as_they_were(tmp_path) -> None:
    Journal(tmp_path).write_line("press-3", RECORD)
    Journal(tmp_path).write_device(DeviceRecord(generation=7))
    (tmp_path / ".press-3.line.json.1a2b3c4d.tmp").write_bytes(b"{")  # of a process that was killed
    assert Journal(tmp_path).lines() == {"press-3": RECORD}
    assert Journal(tmp_path).device().generation == 7


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00", b'{"state": {"phase": "flying"}}'])
def test_a_damaged_record_is_set_aside_and_the_line_starts_from_idle(tmp_path, damage, caplog) -> None:
    journal = Journal(tmp_path)
    journal.write_line("press-3", RECORD)
    journal.write_line("press-4", RECORD)
    (tmp_path / "press-3.line.json").write_bytes(damage)
    state = journal.line("press-3").state
    assert (state.phase, state.error.kind, state.target) == ("idle", "StateError", "")
    assert "was damaged" in state.error.message
    assert (tmp_path / "press-3.line.json.damaged").read_bytes() == damage
    assert "was damaged" in caplog.text
    assert Journal(tmp_path).lines() == {"press-3": LineRecord(state), "press-4": RECORD}
    journal.write_line("press-3", RECORD)
    assert journal.line("press-3") == RECORD


def test_a_folder_in_a_record_s_place_is_set_aside_twice(tmp_path) -> None:
    journal = Journal(tmp_path)
    for _ in range(2):
        (tmp_path / "press-3.line.json" / "inside").mkdir(parents=True)
        assert journal.line("press-3").state.error is not None
        journal.write_line("press-3", RECORD)
        (tmp_path / "press-3.line.json").unlink()
    assert (tmp_path / "press-3.line.json.damaged" / "inside").is_dir()


def test_a_line_name_that_is_a_path_is_refused(tmp_path) -> None:
    with pytest.raises(InputError):
        Journal(tmp_path).line("../outside")


def test_a_shortage_of_the_system_sets_nothing_aside(tmp_path, monkeypatch) -> None:
    journal = Journal(tmp_path)
    journal.write_line("press-3", RECORD)

    def short(_path: Path) -> bytes:
        raise OSError(errno.ENFILE, "Too many open files in system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", short)
        with pytest.raises(StateError, match="cannot be read now"):
            journal.line("press-3")
    assert journal.line("press-3") == RECORD


def test_a_lock_cuts_off_no_file_that_a_link_names(tmp_path) -> None:
    (tmp_path / "precious").write_bytes(b"content")
    (tmp_path / "press-3.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), Journal(tmp_path).lock("press-3", wait=False):
        pass
    assert (tmp_path / "precious").read_bytes() == b"content"


def test_a_damaged_record_on_a_read_only_disk_does_not_end_the_agent(tmp_path, monkeypatch, caplog) -> None:
    def refuse(_path) -> None:
        raise OSError(30, "Read-only file system")

    journal = Journal(tmp_path)
    journal.write_line("press-4", RECORD)
    (tmp_path / "press-3.line.json").write_bytes(b"{")
    monkeypatch.setattr(module, "set_aside", refuse)
    for _ in range(3):
        assert journal.lines() == {"press-3": LineRecord(), "press-4": RECORD}
    assert (tmp_path / "press-3.line.json").exists()
    assert caplog.text.count("Read-only file system") == 1


class TestUnread:
    """A record that is there and cannot be read now: of one line alone, and left as it is."""

    @pytest.fixture
    def journal(self, tmp_path, monkeypatch) -> Journal:
        journal = Journal(tmp_path)
        for line in ("press-3", "press-4"):
            journal.write_line(line, RECORD)
            journal.write_drift(line, LineDrift("watching", "sha256:1", 1, 1, 1, 1))
        read = Path.read_bytes

        def refuse(path: Path) -> bytes:
            if path.name.startswith("press-3."):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", refuse)
        return journal

    def test_the_other_lines_are_read_and_it_says_what_to_do(self, journal) -> None:
        found = journal.lines()
        assert found["press-4"] == RECORD
        unread = found["press-3"]
        assert (unread.unread, unread.state.phase, unread.state.error.kind) == (True, "idle", "StateError")
        assert "Permission denied" in unread.state.error.message
        assert "chown" in unread.state.error.message
        assert list(journal.drift()) == ["press-4"]

    def test_alone_it_raises(self, journal) -> None:
        with pytest.raises(UnreadError, match="cannot be read"):
            journal.line("press-3")


class TestPrune:
    def fill(self, journal: Journal, count: int, **fields) -> list[str]:
        names = [f"stranger-{number:02}" for number in range(count)]
        for number, name in enumerate(names):
            journal.write_line(name, LineRecord(LineState(**{"phase": "rejected", **fields})))
            os.utime(journal._line_file(name), ns=(number * 10**9, number * 10**9))
        return names

    def test_the_oldest_go_with_all_that_is_noted_of_them(self, tmp_path) -> None:
        journal = Journal(tmp_path)
        names = self.fill(journal, MAX_STRANGERS + 3)
        with journal.lock(names[0], wait=False):
            pass
        journal.write_drift(names[1], LineDrift("watching", "sha256:1", 1, 1, 1, 1))
        assert journal.prune({"press-3"}, MAX_STRANGERS) == names[:3]
        assert sorted(journal.lines()) == names[3:]
        assert [path.name for path in tmp_path.iterdir() if path.name.partition(".")[0] in names[:3]] == []

    @pytest.mark.parametrize("fields", [{"slot": "a"}, {"phase": "downloading"}])
    def test_never_of_a_line_that_serves_or_works(self, tmp_path, fields) -> None:
        journal = Journal(tmp_path)
        names = self.fill(journal, MAX_STRANGERS + 3, **fields)
        assert journal.prune((), MAX_STRANGERS) == []
        assert sorted(journal.lines()) == names

    def test_nor_of_one_that_is_to_be_kept(self, tmp_path) -> None:
        journal = Journal(tmp_path)
        names = self.fill(journal, MAX_STRANGERS + 3)
        assert journal.prune(names[:3], MAX_STRANGERS) == []
