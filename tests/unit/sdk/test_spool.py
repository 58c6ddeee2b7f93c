"""Offering frames, the folder's limits, the files' form, and the answers' log."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import StateError
from kiridashi.spool import Answer, AnswerLog, Frame, FrameHeader, Place, Spool, SpoolFolder, SpoolLimits
from kiridashi.spool.answers import MAX_LOG_BYTES
from kiridashi.spool.entries import decode_frame, encode_frame, new_name, parse_name
from kiridashi.spool.folder import MAX_ASIDE
from kiridashi.spool.limits import displaced

LABELS = ("dent", "ok", "scratch")
QUICK = SpoolLimits(frames=16, filling_s=0.001, full_s=0.001, rest_s=0.05, free_disk_bytes=0)


def frame(value: int = 7, height: int = 4, width: int = 6) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def values(margin: float) -> np.ndarray:
    return np.array([(1 + margin) / 2, (1 - margin) / 2, 0], np.float32)


def kept(spool: Spool | SpoolFolder) -> list[Frame]:
    folder = spool.folder if isinstance(spool, Spool) else spool
    frames = [folder.read(folder.frames / place.name) for place in folder.scan(folder.frames)]
    assert None not in frames
    return frames


def offer_all(spool: Spool, margins: list[float], pause_s: float = 0.004) -> None:
    """One write for every offer: the thread has time in between."""
    for number, margin in enumerate(margins):
        spool.offer(frame(number % 251), values(margin), "sha256:m", LABELS)
        time.sleep(pause_s)
    spool.close()


def a_frame() -> Frame:
    pixels = frame(9).tobytes()
    header = FrameHeader("l", "sha256:m", 5.0, 4, 6, (0.6, 0.3, 0.1), LABELS, zlib.crc32(pixels))
    return Frame(header, pixels)


def test_a_frame_comes_back_as_it_was() -> None:
    assert decode_frame(encode_frame(a_frame()), "here") == a_frame()


def test_every_torn_or_changed_file_is_known() -> None:
    whole = encode_frame(a_frame())
    for length in range(len(whole)):
        with pytest.raises(StateError):
            decode_frame(whole[:length], "here")
    with pytest.raises(StateError, match="pixels"):
        decode_frame(whole[:-1] + b"\x01", "here")
    with pytest.raises(StateError):
        decode_frame(whole + b"\x00", "here")


@given(st.floats(-20, 5000), st.floats(-20, 5000), st.floats(0, 3e9))
def test_names_sort_by_rank_and_tell_it(first: float, second: float, clock_s: float) -> None:
    names = [new_name("uncertain", rank, clock_s) for rank in (first, second)]
    places = [parse_name(name, 10) for name in names]
    assert [place.rank for place in places] == pytest.approx([first, second], abs=1e-6)
    assert places[0].clock_s == pytest.approx(clock_s, abs=0.1)
    if abs(first - second) > 1e-8:
        assert (names[0] < names[1]) == (first < second)


@pytest.mark.parametrize("name", ["a.frame", "../x", ".u-0-0-0.frame.part", "u-" + "0" * 14 + ".frame"])
def test_other_names_are_not_taken_for_frames(name: str) -> None:
    assert parse_name(name, 1) is None


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(1, 400))
def test_what_leaves_makes_room_and_is_the_lowest(sizes: list[int], size: int) -> None:
    limits = SpoolLimits(frames=12, bytes=2000)
    places = [Place(str(n), "uncertain", float(n), 0.0, size) for n, size in enumerate(sizes)]
    leaving = displaced(places, size, "uncertain", limits)
    staying = places[len(leaving) :]
    assert leaving == places[: len(leaving)]
    assert len(staying) + 1 <= 9
    assert sum(place.bytes for place in staying) + size <= 1500 or not staying
    if leaving:
        back = [leaving[-1], *staying]
        assert len(back) + 1 > 9 or sum(place.bytes for place in back) + size > 1500


def test_the_least_sure_frames_stay_and_a_random_draw_beside_them(tmp_path) -> None:
    spool = Spool(SpoolFolder(tmp_path, "l"), QUICK, seed=1)
    rng = np.random.default_rng(0)
    margins = [float(m) for m in rng.uniform(0, 1, 300)]
    offer_all(spool, margins)
    places = spool.folder.scan(spool.folder.frames)
    uncertain = [f.header.margin for f, p in zip(kept(spool), places, strict=True) if p.kind == "uncertain"]
    drawn = [place for place in places if place.kind == "random"]
    assert len(uncertain) == 12
    assert len(drawn) == 4
    assert max(uncertain) < 0.2  # of 300 frames the 12 least sure are below 0.04; some pass between two writes
    assert np.median(uncertain) < 0.1


def test_the_random_draw_does_not_look_at_the_values(tmp_path) -> None:
    drawn = []
    for seed in range(12):
        spool = Spool(SpoolFolder(tmp_path, f"l{seed}"), QUICK, seed=seed)
        offer_all(spool, [n % 2 * 1.0 for n in range(60)], pause_s=0.003)
        places = spool.folder.scan(spool.folder.frames)
        drawn += [f.header.margin for f, p in zip(kept(spool), places, strict=True) if p.kind == "random"]
    assert 0.25 < np.mean(drawn) < 0.75


def test_on_a_slow_line_both_sets_get_their_share(tmp_path) -> None:
    """One frame between two writes is the best of its interval in both ways."""
    spool = Spool(SpoolFolder(tmp_path, "l"), SpoolLimits(frames=400, filling_s=0.001, free_disk_bytes=0), seed=0)
    margins = [n % 2 * 0.8 for n in range(160)]
    offer_all(spool, margins, pause_s=0.006)
    places = spool.folder.scan(spool.folder.frames)
    drawn = [f.header.margin for f, p in zip(kept(spool), places, strict=True) if p.kind == "random"]
    assert len(places) > 120
    assert 0.15 < len(drawn) / len(places) < 0.4
    assert 0.2 < np.mean(drawn) < 0.6


def test_a_flood_stays_inside_the_limits_of_files_and_bytes(tmp_path) -> None:
    limits = SpoolLimits(frames=400, bytes=20_000, filling_s=0.0, full_s=0.0, free_disk_bytes=0)
    spool = Spool(SpoolFolder(tmp_path, "l"), limits, seed=0)
    rng = np.random.default_rng(0)
    for number in range(3000):
        spool.offer(frame(1, 10, 20), rng.dirichlet(np.ones(3)).astype(np.float32), "sha256:m", LABELS)
        if number % 100 == 0:
            assert sum(place.bytes for place in spool.folder.scan(spool.folder.frames)) <= 20_000
    spool.close()
    assert 0 < sum(place.bytes for place in spool.folder.scan(spool.folder.frames)) <= 20_000
    counts = spool.counts()
    assert counts.offered == 3000
    assert counts.failed == 0
    assert counts.written < 3000


def test_between_two_writes_only_the_best_is_kept(tmp_path) -> None:
    spool = Spool(SpoolFolder(tmp_path, "l"), SpoolLimits(filling_s=30.0), seed=0)
    for margin in (0.9, 0.2, 0.5, 0.05, 0.7):
        spool.offer(frame(round(100 * margin)), values(margin), "sha256:m", LABELS)
    spool.close()
    places = spool.folder.scan(spool.folder.frames)
    assert 1 <= len(places) <= 2
    assert 0.05 in [round(f.header.margin, 3) for f in kept(spool)]


def test_a_kept_frame_is_a_copy_with_all_that_was_said(tmp_path) -> None:
    spool, image = Spool(SpoolFolder(tmp_path, "press-3"), QUICK), frame(20)
    spool.offer(image, values(0.4), "sha256:m", list(LABELS))
    image[:] = 0
    spool.close()
    (one,) = kept(spool)
    assert one.pixels == frame(20).tobytes()
    assert (one.header.line, one.header.digest, one.header.labels) == ("press-3", "sha256:m", LABELS)
    assert one.header.values == (0.7, 0.3, 0.0)
    assert abs(one.header.time_s - time.time()) < 30


def test_large_frames_are_halved_until_they_fit(tmp_path) -> None:
    spool = Spool(SpoolFolder(tmp_path, "l"), SpoolLimits(filling_s=0.0, frame_bytes=2000, free_disk_bytes=0))
    image = np.zeros((81, 60, 3), np.uint8)
    image[:, ::2] = 200
    spool.offer(image, values(0.1), "sha256:m")
    spool.close()
    (one,) = kept(spool)
    assert (one.header.height, one.header.width) == (20, 15)
    assert set(one.pixels) == {100}


@pytest.mark.parametrize(
    ("image", "numbers", "labels"),
    [
        (frame().astype(np.float32), values(0.1), LABELS),
        (frame()[0], values(0.1), LABELS),
        (frame()[None], values(0.1), LABELS),
        (np.zeros((0, 4, 3), np.uint8), values(0.1), LABELS),
        (frame(), np.full(3, np.nan, np.float32), LABELS),
        (frame(), np.empty(0, np.float32), ()),
        (frame(), values(0.1), LABELS[:2]),
        (frame(), np.ones((2, 2), np.float32), ()),
        (None, values(0.1), LABELS),
        (frame(), None, LABELS),
    ],
)
def test_what_cannot_be_kept_never_reaches_the_line(tmp_path, image, numbers, labels) -> None:
    spool = Spool(SpoolFolder(tmp_path, "l"), QUICK)
    spool.offer(image, numbers, "sha256:m", labels)
    spool.offer(frame(), values(0.3), "sha256:m", LABELS)
    spool.close()
    assert spool.counts().failed == 1
    assert spool.counts().error
    assert len(kept(spool)) == 1


def test_nothing_is_open_to_other_accounts(tmp_path) -> None:
    before = os.umask(0)
    try:
        spool = Spool(SpoolFolder(tmp_path, "l"), QUICK)
        offer_all(spool, [0.1, 0.2])
        AnswerLog(spool.folder.answers_path).add(Answer("1", "x", "unsure", 0.0))
    finally:
        os.umask(before)
    for path in [spool.folder.root, *spool.folder.root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("step", ["add", "prepare", "scan"])
def test_a_full_disk_at_any_step_costs_frames_and_nothing_else(tmp_path, monkeypatch, step) -> None:
    spool = Spool(SpoolFolder(tmp_path, "l"), QUICK)
    working = getattr(SpoolFolder, step)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SpoolFolder, step, full)
    for _ in range(20):
        spool.offer(frame(), values(0.1), "sha256:m", LABELS)
        time.sleep(0.002)
    assert spool.counts().written == 0
    assert 1 <= spool.counts().failed < 5  # it rests after a failure instead of trying at every frame
    assert "No space left" in spool.counts().error
    monkeypatch.setattr(SpoolFolder, step, working)
    time.sleep(0.1)
    offer_all(spool, [0.1] * 3)
    assert spool.counts().written > 0
    assert not list(spool.folder.frames.glob(".*"))


def test_a_nearly_full_disk_is_left_alone(tmp_path) -> None:
    spool = Spool(SpoolFolder(tmp_path, "l"), SpoolLimits(filling_s=0.0, free_disk_bytes=1 << 60))
    offer_all(spool, [0.1, 0.2])
    assert kept(spool) == []
    assert "nearly full" in spool.counts().error


def test_age_is_running_time_and_goes_on_whatever_the_clock_says(tmp_path, monkeypatch) -> None:
    folder = SpoolFolder(tmp_path, "l")
    folder.prepare()
    folder.add(new_name("uncertain", 100.0, 70 * 86400.0), encode_frame(a_frame()))
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a device without a clock starts in 1970
    spool = Spool(folder, QUICK, seed=0)
    offer_all(spool, [0.5])
    newest = max(folder.scan(folder.frames), key=lambda place: place.clock_s)
    assert newest.clock_s == pytest.approx(70 * 86400.0, abs=5)
    assert newest.rank > 9


def test_files_that_are_no_frames_are_set_aside_and_counted(tmp_path, caplog) -> None:
    folder = SpoolFolder(tmp_path, "l")
    folder.prepare()
    torn = new_name("uncertain", 1.0, 1.0)
    (folder.frames / torn).write_bytes(encode_frame(a_frame())[:-5])
    for number in range(MAX_ASIDE + 5):
        (folder.frames / f"junk-{number}").write_bytes(b"x")
    (folder.frames / new_name("random", 1.0, 1.0)).symlink_to("/etc/passwd")
    places = folder.scan(folder.frames)
    assert [place.name for place in places] == [torn]
    assert folder.read(folder.frames / torn) is None
    assert folder.scan(folder.frames) == []
    assert folder.damaged() == MAX_ASIDE
    assert "set aside" in caplog.text


def test_what_a_crash_left_unfinished_is_removed(tmp_path) -> None:
    folder = SpoolFolder(tmp_path, "l")
    folder.prepare()
    fresh, old = (folder.frames / f".{n}.frame.part" for n in "ab")
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    assert folder.scan(folder.frames) == []
    assert [path.name for path in folder.frames.iterdir()] == [fresh.name]
    assert folder.damaged() == 0


def test_a_spool_that_cannot_be_made_does_not_disturb(tmp_path) -> None:
    (tmp_path / "spool").write_bytes(b"a file where the folder should be")
    spool = Spool.open("l", tmp_path, QUICK)
    offer_all(spool, [0.1])
    assert spool.counts().failed >= 1


def test_the_resident_and_the_page_need_no_numpy() -> None:
    code = (
        "import sys, kiridashi.spool, kiridashi_agent.cli.label, kiridashi_agent.cli.status, kiridashi_agent.actions\n"
        "assert not {'numpy', 'onnxruntime', 'ai_edge_litert'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def an_answer(number: int, entry: str = "e", label: str = "dent") -> Answer:
    return Answer(str(number), entry, "class", float(number), label, "KT")


def test_the_last_answer_that_was_not_taken_back_holds(tmp_path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    assert log.answers() == []
    first, second, other = an_answer(1), an_answer(2, label="ok"), an_answer(3, "f")
    for answer in (first, second, other):
        log.add(answer)
    assert log.answers() == [second, other]
    log.undo("2", 4.0)
    assert log.answers() == [first, other]
    log.undo("2", 4.0)
    log.undo("1", 5.0)
    assert log.answers() == [other]
    assert log.path.read_bytes().count(b"\n") == 6  # nothing is rewritten


def test_a_torn_line_is_skipped_and_the_next_answer_is_whole(tmp_path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.add(an_answer(1))
    whole = log.path.read_bytes()
    for length in range(1, len(whole) - 1):
        log.path.write_bytes(whole + whole[:length])
        log.add(an_answer(2, "f"))
        assert [answer.id for answer in log.answers()] == ["1", "2"]


def test_an_answer_that_cannot_be_written_is_refused_and_leaves_no_trace(tmp_path, monkeypatch) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.add(an_answer(1))
    before = log.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left"):
        log.add(an_answer(2))
    assert log.path.read_bytes() == before


def test_the_log_is_bounded_and_loses_no_answer_that_holds(tmp_path) -> None:
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.add(an_answer(1))
    with log.path.open("ab") as file:
        for number in range(MAX_LOG_BYTES // 60):
            file.write(b'{"do":"undo","id":"%032d","at_s":1.0,"by":""}\n' % number)
    log.add(an_answer(2, "f"))
    assert log.path.stat().st_size < 1000
    assert [answer.id for answer in log.answers()] == ["1", "2"]
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_an_answer_of_any_length_is_not_accepted(tmp_path) -> None:
    with pytest.raises(StateError, match="too long"):
        AnswerLog(tmp_path / "answers.jsonl").add(an_answer(1, label="x" * 5000))


def test_a_shortage_of_the_system_sets_no_frame_aside(tmp_path, monkeypatch) -> None:
    folder = SpoolFolder(tmp_path, "l")
    folder.prepare()
    path = folder.answered / new_name("uncertain", 1.0, 1.0)
    path.write_bytes(encode_frame(a_frame()))

    def short(*_arguments: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", short)
        assert folder.read(path) is None
    assert folder.read(path) == a_frame()
    assert folder.damaged() == 0
