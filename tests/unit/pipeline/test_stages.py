"""Stages: kept when finished, redone when anything they depend on changed, untouched by a crash."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
from kiridashi.errors import InputError, StateError
from kiridashi_server import stages
from kiridashi_server.stages import Workspace


class Sum(msgspec.Struct, frozen=True):
    value: int


def add(workspace: Workspace, calls: list[int], left: int, right: int) -> Sum:
    def work(folder: Path) -> Sum:
        calls.append(left)
        (folder / "note.txt").write_text("made")
        return Sum(left + right)

    return workspace.run("sum", [left, right], work, Sum)


def test_a_finished_stage_is_reused_with_its_files_and_its_time(tmp_path: Path) -> None:
    calls: list[int] = []
    first = Workspace(tmp_path)
    assert add(first, calls, 1, 2) == Sum(3)
    second = Workspace(tmp_path)
    assert add(second, calls, 1, 2) == Sum(3)
    assert calls == [1]
    assert (second.place("sum") / "note.txt").read_text() == "made"
    assert [t.reused for t in first.times + second.times] == [False, True]
    assert second.times[0].seconds == first.times[0].seconds


def test_other_inputs_other_code_or_a_damaged_result_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    add(Workspace(tmp_path), calls, 1, 2)
    assert add(Workspace(tmp_path), calls, 1, 5) == Sum(6)
    monkeypatch.setattr(stages, "code_digest", lambda: "other code")
    add(Workspace(tmp_path), calls, 1, 5)
    (tmp_path / "stages" / "sum" / "stage.json").write_bytes(b"{")
    add(Workspace(tmp_path), calls, 1, 5)
    assert len(calls) == 4


def test_a_stage_that_fails_leaves_the_old_result(tmp_path: Path) -> None:
    add(Workspace(tmp_path), [], 1, 2)

    def fail(folder: Path) -> Sum:
        raise InputError("no")

    with pytest.raises(InputError):
        Workspace(tmp_path).run("sum", "other", fail, Sum)
    assert msgspec.json.decode((tmp_path / "stages/sum/stage.json").read_bytes())["result"] == {"value": 3}


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import msgspec
        from kiridashi_server.stages import Workspace
        class Sum(msgspec.Struct): value: int
        def two(folder):
            (folder / "half").write_text("half")
            if sys.argv[2] == "die": os.kill(os.getpid(), signal.SIGKILL)
            assert [p.name for p in folder.iterdir()] == ["half"]
            return Sum(2)
        workspace = Workspace(Path(sys.argv[1]))
        with workspace.locked():
            workspace.run("one", 1, lambda folder: Sum(1), Sum)
            workspace.run("two", 2, two, Sum)
        print([t.reused for t in workspace.times])
        """)
    )
    command = [sys.executable, str(script), str(tmp_path / "out")]
    killed = subprocess.run([*command, "die"], check=False)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([*command, "live"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[True, False]"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with Workspace(tmp_path).locked(), pytest.raises(StateError, match="another run"), Workspace(tmp_path).locked():
        pass


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used") as caught, Workspace(tmp_path / "file").locked():
        pass
    assert "another folder" in caught.value.next_step


def test_the_machine_is_named() -> None:
    assert f"{len(os.sched_getaffinity(0))} cores" in stages.machine()
