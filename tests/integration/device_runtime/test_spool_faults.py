"""The spool with real processes: floods, kills, full disks, two writers; and tuning on what people named."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.errors import InputError, StateError
from kiridashi.gathering import Sources, gather
from kiridashi.samples import Samples, write_samples
from kiridashi.spool import Answer, AnswerLog, Spool, SpoolFolder
from kiridashi_agent.jobs import TuneRequest, tune

from tests.assets.label_place import add_frame
from tests.assets.tiny_bundle import LABELS, SIDE, device_tiles
from tests.integration.device_runtime.conftest import Device, install

LINE = "press-3"
LIMIT_FILES, LIMIT_BYTES = 24, 300_000

# A line that floods its spool: every frame is a candidate, and there is no pause between two writes.
FLOOD = f"""
import itertools, sys
import numpy as np
from kiridashi.spool import Spool, SpoolLimits
limits = SpoolLimits(frames={LIMIT_FILES}, bytes={LIMIT_BYTES}, filling_s=0.0, full_s=0.0, free_disk_bytes=0)
spool = Spool.open("{LINE}", sys.argv[1], limits)
rng = np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
for number in itertools.count():
    frame = np.full((64, 64, 3), number % 251, np.uint8)
    spool.offer(frame, rng.dirichlet(np.ones(4)).astype(np.float32), "sha256:m", {list(LABELS)!r})
"""

# A line that predicts while nothing can be written: no file may have a byte more than the limit.
WITHOUT_DISK = f"""
import json, resource, sys, time
import numpy as np
from kiridashi import LineModel
from kiridashi.spool import Spool, SpoolLimits
frames = np.load(sys.argv[2])
limit = int(sys.argv[3])
limits = SpoolLimits(filling_s=0.0, full_s=0.0, rest_s=0.01, free_disk_bytes=0)
spool = Spool.open("{LINE}", sys.argv[1], limits)
with LineModel.open("{LINE}", sys.argv[1]) as model:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    seen = []
    for _ in range(10):
        for frame in frames:
            result = model.predict(frame)
            spool.offer(frame, result.values, result.model_digest, result.labels)
            seen.append(result.label)
        time.sleep(0.02)
spool.close()
counts = spool.counts()
print(json.dumps([seen, counts.offered, counts.written, counts.failed, counts.error]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path / "state", LINE)


def flood(state: Path, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FLOOD, str(state), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_two_floods_at_once_stay_inside_the_limits_and_a_reader_sees_whole_frames(folder: SpoolFolder) -> None:
    state, seen, files, size = folder.root.parent.parent, 0, 0, 0
    with ExitStack() as stack:
        for seed in (1, 2):
            stack.callback(end, flood(state, seed))
        until = time.monotonic() + 4
        while time.monotonic() < until:
            places = folder.scan(folder.frames)
            files, size = max(files, len(places)), max(size, sum(place.bytes for place in places))
            for place in places[:3]:
                frame = folder.read(folder.frames / place.name)
                if frame is not None:  # else it was displaced meanwhile
                    seen += 1
                    assert len(set(frame.pixels)) == 1
            time.sleep(0.01)
    assert seen > 20
    assert folder.damaged() == 0
    # Each writer makes room before it writes; the other may write in between, and a listing is not of one moment.
    one = max(place.bytes for place in folder.scan(folder.frames))
    assert LIMIT_BYTES / 2 < size <= LIMIT_BYTES + 4 * one
    assert files <= LIMIT_FILES + 4


def test_killed_at_any_moment_it_leaves_whole_frames_and_goes_on(folder: SpoolFolder) -> None:
    state, rng = folder.root.parent.parent, np.random.default_rng(0)
    for seed in range(8):
        process = flood(state, seed)
        time.sleep(float(rng.uniform(0.05, 0.25)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        places = folder.scan(folder.frames)
        assert [folder.read(folder.frames / place.name) is None for place in places].count(True) == 0
    assert places
    assert folder.damaged() == 0
    assert sum(path.stat().st_size for path in folder.frames.iterdir()) < 2 * LIMIT_BYTES


@pytest.mark.parametrize("limit", [0, 100, 500])
def test_a_line_without_disk_predicts_as_before(device: Device, tmp_path: Path, limit: int) -> None:
    frames, _ = device_tiles(4, seed=7)
    np.save(tmp_path / "frames.npy", frames)
    with LineModel.open(LINE, device.state_dir) as model:
        wanted = [model.predict(frame).label for frame in frames]
    command = [sys.executable, "-c", WITHOUT_DISK, str(device.state_dir), str(tmp_path / "frames.npy"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    seen, offered, written, failed, error = json.loads(done.stdout)
    assert seen == wanted * 10
    assert (offered, written) == (160, 0)
    assert failed >= 2
    assert "File too large" in error
    assert [path for path in (device.state_dir / "spool").rglob("*") if path.is_file()] == []
    assert "Traceback" not in done.stderr


def test_a_spool_that_vanishes_under_the_line_comes_back(folder: SpoolFolder) -> None:
    process = flood(folder.root.parent.parent, 1)
    try:
        for _ in range(3):
            shutil.rmtree(folder.root, ignore_errors=True)
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        end(process)


def load(files: Path | None, folder: SpoolFolder) -> Samples:
    return gather(Sources(files, spool=folder), LABELS, SIDE, SIDE).samples


def name_tiles(state: Path, per_class: int = 8, *, swap: bool = False) -> SpoolFolder:
    """Device tiles in the spool, each named by somebody."""
    folder = SpoolFolder(state, LINE)
    images, classes = device_tiles(per_class, seed=5)
    log = AnswerLog(folder.answers_path)
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        entry = add_frame(folder, [0.4, 0.3, 0.2, 0.1], image=image, rank=float(number))
        (place,) = [place for place in folder.scan(folder.frames) if place.name == entry]
        assert folder.claim(place)
        name = LABELS[(label + 1) % len(LABELS)] if swap else LABELS[label]
        log.add(Answer(str(number), entry, "class", float(number), name))
    return folder


def test_tuning_wins_on_named_frames_alone(device: Device, shipped: Path) -> None:
    install(device.slots, "b", shipped)
    name_tiles(device.state_dir)
    request = TuneRequest(str(device.state_dir), LINE, "b", "model.onnx", samples="", device="dev-1")
    report = tune(request).report
    assert report.kept, report.reason
    assert (report.samples, report.holdout) == (24, 8)
    assert report.accuracy_before <= 0.6 < 0.9 < report.accuracy_after


def test_without_a_class_named_nothing_is_tuned_and_the_report_says_why(device: Device, shipped: Path) -> None:
    install(device.slots, "b", shipped)
    folder = name_tiles(device.state_dir, per_class=2)
    log = AnswerLog(folder.answers_path)
    for answer in log.answers():
        if answer.label == "dent":
            log.undo(answer.id, 1.0)
    request = TuneRequest(str(device.state_dir), LINE, "b", "model.onnx", samples="", device="dev-1")
    report = tune(request).report
    assert not report.kept
    assert "'dent'" in report.reason


def test_named_frames_stand_beside_files_and_files_count_more(device: Device, tmp_path: Path) -> None:
    folder = name_tiles(device.state_dir, swap=True)
    images, classes = device_tiles(8, seed=5)
    write_samples(tmp_path / "files" / "a.npz", images[:10], classes[:10])
    joined = load(tmp_path / "files", folder)
    assert len(joined) == len(images)
    assert list(joined.labels[:10]) == list(classes[:10])  # what people said of the same frames is not taken
    assert set(joined.part(holdout=True).labels) == set(range(len(LABELS)))
    alone = load(None, folder)
    assert len(alone) == len(images)


def test_only_classes_that_the_model_knows_are_read_and_frames_are_resized(folder: SpoolFolder) -> None:
    log = AnswerLog(folder.answers_path)
    wide = np.zeros((40, 30, 3), np.uint8)
    for number, (kind, label) in enumerate((("class", "dent"), ("class", "gone"), ("unsure", ""), ("none", ""))):
        entry = add_frame(folder, [0.4, 0.3, 0.2, 0.1], image=wide + number)
        folder.claim(folder.scan(folder.frames)[0])
        log.add(Answer(str(number), entry, kind, 1.0, label))  # type: ignore[arg-type]
    samples = load(None, folder)
    assert samples.images.shape == (1, SIDE, SIDE, 3)
    assert list(samples.labels) == [0]


def test_a_damaged_named_frame_is_left_out_and_set_aside(folder: SpoolFolder) -> None:
    name_tiles(folder.root.parent.parent, per_class=2)
    victim = folder.scan(folder.answered)[0].name
    path = folder.answered / victim
    path.write_bytes(path.read_bytes()[:-1])
    assert len(load(None, folder)) == 7
    assert folder.damaged() == 1


def test_nothing_named_is_no_samples(folder: SpoolFolder, tmp_path: Path) -> None:
    assert len(load(None, folder)) == 0
    with pytest.raises(InputError, match="no samples"):
        load(tmp_path / "none", folder)
    folder.answers_path.parent.mkdir(parents=True)
    folder.answers_path.mkdir()
    with pytest.raises(StateError):
        load(None, folder)


def test_the_cost_of_an_offer_is_microseconds(tmp_path: Path) -> None:
    spool = Spool.open(LINE, tmp_path)
    frame, rng = np.zeros((224, 224, 3), np.uint8), np.random.default_rng(0)
    values = rng.dirichlet(np.ones(8), 2000).astype(np.float32)
    took = []
    for row in values:
        start = time.perf_counter_ns()
        spool.offer(frame, row, "sha256:m", ())
        took.append(time.perf_counter_ns() - start)
    spool.close()
    assert np.median(took) < 100_000  # 5 microseconds on a quiet machine
