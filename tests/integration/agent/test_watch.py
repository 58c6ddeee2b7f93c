"""The drift watch over a real spool and in its real child process: exactly once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from agent_program import AgentProgram, wait_for
from kiridashi import LineModel
from kiridashi.artifacts import MANIFEST_NAME, describe_file
from kiridashi.drift.rows import REFERENCE_NAME, Row, RowFile, RowFolder, write_reference
from kiridashi.drift.statistics import NAMES
from kiridashi.manifest import Manifest
from kiridashi.slots import LineSlots
from kiridashi.spool import Answer, AnswerLog, Spool, SpoolFolder, SpoolLimits
from kiridashi_agent import jobs, watch
from kiridashi_agent.jobs import WatchOutcome, WatchRequest
from kiridashi_agent.label.session import LabelGoal, LabelSession
from kiridashi_agent.watch import MAX_WAITING, state_path
from label_place import LINE, activate, add_frame
from tiny_bundle import LABELS, SIDE, server_tiles

WANTED = 100
QUICK = SpoolLimits(sample_s=0.0, sample_write_s=60.0, filling_s=0.01, free_disk_bytes=0)


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return activate(tmp_path)


def note(state: Path, digest: str, count: int, seed: int, **shift: float) -> None:
    """What a line's process leaves of so many independent frames."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, len(NAMES)))
    for name, amount in shift.items():
        values[:, NAMES.index(name)] += amount
    rows = [Row(time.time(), int(rng.integers(len(LABELS))), tuple(row)) for row in values.tolist()]
    folder = RowFolder(state, LINE)
    for start in range(0, count, 50):
        folder.add(RowFile(digest, NAMES, tuple(rows[start : start + 50])))


def caught_up(spool: Spool, frames: int) -> bool:
    """However busy the machine is: no frame of the test is left out."""
    return spool.sampler.noted >= frames


def look(state: Path) -> WatchOutcome:
    return jobs.watch(WatchRequest(str(state), {LINE: WANTED}))


def test_two_looks_that_were_killed_count_no_row_twice(tmp_path, manifest, monkeypatch) -> None:
    """Each time after the state was written and before the files of that look were removed."""
    request, remove = WatchRequest(str(tmp_path), {LINE: WANTED}), RowFolder.remove

    def killed(folder: RowFolder, names) -> None:
        if calls.pop():
            raise KeyboardInterrupt
        remove(folder, names)

    for seed in (1, 2):
        note(tmp_path, manifest.digest, 50, seed)
        calls = [True, False]  # what an earlier look left is removed, what this one took is not
        with monkeypatch.context() as patch:
            patch.setattr(RowFolder, "remove", killed)
            with pytest.raises(KeyboardInterrupt):
                watch.run(request)
    assert watch.run(request).lines[LINE].sampled == 100
    assert RowFolder(tmp_path, LINE).names() == []


def test_what_is_no_file_does_not_stop_the_watch(tmp_path, manifest) -> None:
    note(tmp_path, manifest.digest, 50, seed=1)
    folder = RowFolder(tmp_path, LINE)
    (folder.path / "0.rows").mkdir()
    os.mkfifo(folder.path / "1.rows")
    outcome = look(tmp_path)
    assert (outcome.failed, outcome.lines[LINE].sampled) == ({}, 50)


def test_a_line_process_is_watched_through_its_spool(tmp_path, manifest) -> None:
    """Normal frames, then a lamp that has become weaker: through predict, sampler, files, child, and the label page."""
    images, _ = server_tiles(120, seed=4)
    images = images[np.random.default_rng(4).permutation(len(images))]
    spool = Spool.open(LINE, tmp_path, QUICK)
    with LineModel.open(LINE, tmp_path, spool=spool) as model:
        for number, image in enumerate(images):
            model.predict(image if number < 300 else (image * 0.6).astype(np.uint8))
            wait_for(partial(caught_up, spool, number + 1))
        spool.close()
        assert spool.sampler.error == ""
    drift = look(tmp_path).lines[LINE]
    assert drift.phase == "watching"
    assert drift.model_digest == manifest.digest
    assert drift.sampled == len(images)
    finding = next(finding for finding in drift.findings if finding.signal == "image")
    assert finding.reference == "line"
    assert finding.tested > 0
    assert finding.examples

    session = LabelSession(SpoolFolder(tmp_path, LINE), LabelGoal(LABELS, manifest.digest))
    shown = session.view().entry
    assert shown in {name for one in drift.findings for name in one.examples}
    pixels = np.frombuffer(session.frame(shown).pixels, np.uint8)
    assert pixels.mean() < np.mean(images[:300].mean(axis=(1, 2, 3))), "the page does not show a dark frame"


def test_rows_count_once_also_after_a_crash_between_state_and_files(tmp_path, manifest) -> None:
    note(tmp_path, manifest.digest, 250, seed=1)
    folder = RowFolder(tmp_path, LINE)
    names = folder.names()
    left = {name: (folder.path / name).read_bytes() for name in names}
    first = look(tmp_path).lines[LINE]
    assert (first.sampled, folder.names()) == (250, [])
    for name, data in left.items():  # as if the child had been killed before it removed them
        (folder.path / name).write_bytes(data)
    note(tmp_path, manifest.digest, 50, seed=2)
    again = look(tmp_path).lines[LINE]
    assert (again.sampled, folder.names()) == (300, [])


def test_a_killed_child_loses_nothing(tmp_path, manifest) -> None:
    note(tmp_path, manifest.digest, 250, seed=1)
    request = msgspec.json.encode({"body": {"state_dir": str(tmp_path), "lines": {LINE: WANTED}}})
    child = subprocess.Popen(
        [sys.executable, "-m", "kiridashi_agent.child", "watch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdin.write(request + b"\n")
    child.stdin.flush()
    path = state_path(tmp_path, LINE)
    deadline = time.monotonic() + 30
    while not path.exists() and child.poll() is None and time.monotonic() < deadline:
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=30)
    assert look(tmp_path).lines[LINE].sampled == 250


def test_rows_of_another_model_and_of_other_statistics_do_not_count(tmp_path, manifest) -> None:
    note(tmp_path, "sha256:another", 60, seed=1)
    RowFolder(tmp_path, LINE).add(RowFile(manifest.digest, ("other",), (Row(0.0, 0, (1.0,)),)))
    RowFolder(tmp_path, LINE).add(RowFile(manifest.digest, NAMES, (Row(0.0, 99, (1.0,) * len(NAMES)),)))
    note(tmp_path, manifest.digest, 10, seed=1)
    drift = look(tmp_path).lines[LINE]
    assert (drift.phase, drift.sampled, RowFolder(tmp_path, LINE).names()) == ("learning", 10, [])


def test_another_model_begins_anew_and_a_damaged_state_is_set_aside(tmp_path, manifest) -> None:
    note(tmp_path, manifest.digest, 250, seed=1)
    assert look(tmp_path).lines[LINE].phase == "watching"
    state_path(tmp_path, LINE).write_bytes(b"{")
    drift = look(tmp_path).lines[LINE]
    assert (drift.phase, drift.sampled) == ("learning", 0)
    assert state_path(tmp_path, LINE).with_name(f"{LINE}.json.damaged").exists()
    note(tmp_path, manifest.digest, 60, seed=1)
    assert look(tmp_path).lines[LINE].sampled == 60
    other = activate(tmp_path / "other", tuple("abcd"))
    slots = LineSlots(tmp_path, LINE)
    folder = slots.prepare("b")
    (folder / MANIFEST_NAME).write_bytes(other.encode())
    (folder / "model.onnx").write_bytes((slots.folder("a") / "model.onnx").read_bytes())
    slots.activate(msgspec.structs.replace(slots.served(), slot="b", model_digest=other.digest))
    assert look(tmp_path).lines[LINE].sampled == 0


def test_the_servers_samples_are_compared_with_if_the_bundle_has_them(tmp_path, manifest) -> None:
    slots = LineSlots(tmp_path, LINE)
    folder = slots.folder("a")
    rng = np.random.default_rng(3)
    rows = [Row(0.0, int(rng.integers(4)), tuple(row)) for row in rng.normal(size=(80, len(NAMES))).tolist()]
    write_reference(folder / REFERENCE_NAME, NAMES, rows)
    artifacts = (*manifest.artifacts, describe_file(folder / REFERENCE_NAME, "drift-reference"))
    described = msgspec.structs.replace(manifest, artifacts=artifacts)
    (folder / MANIFEST_NAME).write_bytes(described.encode())
    slots.activate(msgspec.structs.replace(slots.served(), model_digest=described.digest))
    note(tmp_path, described.digest, 250, seed=1, colour=2.5)
    drift = look(tmp_path).lines[LINE]
    assert [(finding.reference, finding.statistic) for finding in drift.findings] == [("server", "colour")]

    write_reference(folder / REFERENCE_NAME, NAMES, rows[:50])  # no longer what the manifest lists
    state_path(tmp_path, LINE).unlink()
    outcome = look(tmp_path)
    assert outcome.lines == {}
    assert REFERENCE_NAME in outcome.failed[LINE]


def test_the_queue_for_names_has_an_end(tmp_path, manifest) -> None:
    folder = SpoolFolder(tmp_path, LINE)
    dark = np.full((SIDE, SIDE, 3), 9, np.uint8)
    waiting = [add_frame(folder, (0.4, 0.3, 0.2, 0.1), image=dark) for _ in range(MAX_WAITING)]
    for place in folder.scan(folder.frames):
        folder.claim(place)
    AnswerLog(folder.answers_path).add(Answer("1", waiting[0], "unsure", 1.0))
    note(tmp_path, manifest.digest, 250, seed=1)
    look(tmp_path)
    time.sleep(0.01)
    note(tmp_path, manifest.digest, 200, seed=2, brightness=-3.0)
    for _ in range(5):
        add_frame(folder, (0.4, 0.3, 0.2, 0.1), image=dark, digest=manifest.digest)
    (finding,) = look(tmp_path).lines[LINE].findings
    assert len(finding.examples) == 1  # one place was free
    assert len(folder.scan(folder.answered)) == MAX_WAITING + 1


def test_the_agent_tells_the_server_and_people(program: AgentProgram, fleet, responder, tmp_path) -> None:
    manifest = activate(program.state)
    program.configure(reference_frames=WANTED)
    code, said = program.call("drift")
    assert (code, said["lines"]) == (0, {LINE: None})
    note(program.state, manifest.digest, 250, seed=1)
    code, said = program.call("drift", "--now", "--line", LINE)
    assert (code, said["lines"][LINE]["phase"]) == (0, "watching")

    note(program.state, manifest.digest, 200, seed=2, brightness=-3.0)
    agent = program.start()
    try:
        wait_for(lambda: any(report.drift and report.drift[LINE].findings for report in responder.states))
    finally:
        agent.terminate()
        agent.communicate(timeout=30)
    report = responder.states[-1]
    assert report.modules_forbidden_loaded == ()
    (finding,) = report.drift[LINE].findings
    assert (finding.reference, finding.statistic) == ("line", "brightness")

    code, said = program.call("status")
    assert said["lines"][LINE]["drift"]["findings"][0]["statistic"] == "brightness"
    code, said = program.call("drift", "--accept")
    assert code == 10, json.dumps(said)
    code, said = program.call("drift", "--accept", "--line", LINE)
    assert (code, said["lines"]) == (0, {LINE: None})
    assert not state_path(program.state, LINE).exists()
