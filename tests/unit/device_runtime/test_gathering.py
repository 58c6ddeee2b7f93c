"""What is learnt from and what is held out, over several tunings; and what is kept of it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError, StateError
from kiridashi.gathering import Gathered, Sources, gather
from kiridashi.kept import KeptFrame, KeptIndex, KeptLimits, KeptSamples, choose_kept, frame_key
from kiridashi.samples import write_samples
from kiridashi.spool import Answer, AnswerLog, SpoolFolder

from tests.assets.label_place import add_frame

LABELS = ("good", "bad")
LINE = "press-3"


def images(count: int, seed: int = 0, side: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def tuned(state: Path, *given: Path, folder: Path | None = None, labels: tuple[str, ...] = LABELS) -> Gathered:
    """What one tuning would take, and with that remembered for the next."""
    sources = Sources(folder, given, SpoolFolder(state, LINE), KeptSamples(state, LINE))
    found = gather(sources, labels, 6, 6)
    found.keep()
    return found


def pixels(found: Gathered, *, holdout: bool) -> set[bytes]:
    return {image.tobytes() for image in found.samples.part(holdout=holdout).images}


def name(folder: SpoolFolder, image: np.ndarray, label: str, number: int) -> str:
    entry = add_frame(folder, [0.5, 0.5], LABELS, image=image, rank=float(number))
    (place,) = [place for place in folder.scan(folder.frames) if place.name == entry]
    assert folder.claim(place)
    AnswerLog(folder.answers_path).add(Answer(f"a{number}", entry, "class", float(number), label))
    return entry


def test_a_frame_held_out_once_is_never_learnt_from(tmp_path: Path) -> None:
    everything, labels = images(60), np.arange(60) % 2
    held: set[bytes] = set()
    for count in (6, 9, 20, 41, 60):
        write_samples(tmp_path / f"{count}.npz", everything[:count], labels[:count])
        found = tuned(tmp_path / "state", tmp_path / f"{count}.npz")
        assert held <= pixels(found, holdout=True)
        assert not held & pixels(found, holdout=False)
        held = pixels(found, holdout=True)
    assert len(held) == pytest.approx(15, abs=1)


def test_not_even_when_a_file_says_so_but_it_may_take_more_out(tmp_path: Path) -> None:
    state = tmp_path / "state"
    write_samples(tmp_path / "a.npz", images(8), np.arange(8) % 2)
    held = pixels(tuned(state, tmp_path / "a.npz"), holdout=True)
    flags = np.array([image.tobytes() not in held for image in images(8)])
    write_samples(tmp_path / "b.npz", images(8), np.arange(8) % 2, flags)
    assert pixels(tuned(state, tmp_path / "b.npz"), holdout=True) == {image.tobytes() for image in images(8)}


def test_what_was_given_once_is_there_the_next_time(tmp_path: Path) -> None:
    state = tmp_path / "state"
    write_samples(tmp_path / "a.npz", images(8), np.arange(8) % 2)
    first = tuned(state, tmp_path / "a.npz")
    assert first.counts() == {"given": 8}
    (tmp_path / "a.npz").unlink()
    second = tuned(state)
    assert second.counts() == {"kept": 8}
    for holdout in (True, False):
        assert pixels(second, holdout=holdout) == pixels(first, holdout=holdout)


def test_files_of_the_line_are_not_copied_but_their_parts_are_remembered(tmp_path: Path) -> None:
    state = tmp_path / "state"
    write_samples(tmp_path / "files" / "a.npz", images(8), np.arange(8) % 2)
    held = pixels(tuned(state, folder=tmp_path / "files"), holdout=True)
    index = KeptSamples(state, LINE).index()
    assert (len(index.frames), len(index.parts), sum(index.parts.values())) == (0, 8, len(held))


def test_an_answer_that_was_taken_back_or_changed_counts_as_it_is_now(tmp_path: Path) -> None:
    folder = SpoolFolder(tmp_path, LINE)
    entries = [name(folder, image, LABELS[n % 2], n) for n, image in enumerate(images(6))]
    tuned(tmp_path)
    for entry in entries:  # the spool has forgotten the frames; the answers are still known
        (folder.answered / entry).unlink()
    log = AnswerLog(folder.answers_path)
    log.undo("a0", 9.0)
    log.add(Answer("again", entries[1], "class", 9.0, "good"))
    found = tuned(tmp_path)
    assert found.counts() == {"kept": 5}
    by_image = {image.tobytes(): label for image, label in zip(found.samples.images, found.samples.labels, strict=True)}
    assert images(6)[0].tobytes() not in by_image
    assert by_image[images(6)[1].tobytes()] == 0
    assert KeptSamples(tmp_path, LINE).index().counts() == {"bad": 2, "good": 3}


def test_classes_that_another_bundle_does_not_know_stay_kept(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(8), [LABELS[n % 2] for n in range(8)])
    tuned(tmp_path / "state", tmp_path / "a.npz")
    other = tuned(tmp_path / "state", labels=("good", "odd"))
    assert other.counts() == {"kept": 4}
    assert "class 'odd'" in other.shortage(("good", "odd"))
    assert tuned(tmp_path / "state").counts() == {"kept": 8}


def test_another_size_of_the_model_changes_no_part(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(8, side=12), np.arange(8) % 2)
    first = tuned(tmp_path / "state", tmp_path / "a.npz")
    kept = KeptSamples(tmp_path / "state", LINE)
    again = gather(Sources(kept=kept), LABELS, 5, 5)
    assert again.samples.images.shape[1:] == (5, 5, 3)
    assert again.parts == first.parts


def test_a_frame_under_two_classes_is_refused_across_places(tmp_path: Path) -> None:
    write_samples(tmp_path / "files" / "a.npz", images(2), np.array([0, 1]))
    write_samples(tmp_path / "b.npz", images(1), np.array([1]))
    with pytest.raises(InputError, match="'good' and 'bad'"):
        tuned(tmp_path / "state", tmp_path / "b.npz", folder=tmp_path / "files")
    assert not KeptSamples(tmp_path / "state", LINE).path.exists()


def frames(counts: dict[tuple[str, bool], int], side: int = 4) -> list[tuple[KeptFrame, bytes]]:
    found = []
    for (label, holdout), count in counts.items():
        for number in range(count):
            data = bytes([number % 256, number // 256, holdout, *label.encode()]).ljust(side * side * 3, b"\0")
            found.append((KeptFrame(frame_key(side, side, data), label, holdout, side, side), data))
    return found


@given(
    st.dictionaries(st.tuples(st.sampled_from(["a", "b"]), st.booleans()), st.integers(1, 40)),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(48, 4000),
)
def test_what_is_kept_is_bounded_and_does_not_depend_on_the_order(counts, learn, hold, size) -> None:
    everything = frames(counts)
    limits = KeptLimits(learn, hold, size)
    kept = choose_kept(everything, limits)
    assert choose_kept(everything[::-1], limits) == kept
    for (label, holdout), count in counts.items():
        own = [frame for frame, _ in kept if (frame.label, frame.holdout) == (label, holdout)]
        assert 1 <= len(own) <= min(count, hold if holdout else learn)
    assert sum(frame.bytes for frame, _ in kept) <= max(size, 48 * len(counts))


def test_the_kept_are_a_uniform_draw_whatever_came_first() -> None:
    """Frames of ten tunings, one after the other, have the same chance to be kept."""
    stream = frames({("a", False): 1000})
    kept: list[tuple[KeptFrame, bytes]] = []
    for start in range(0, 1000, 100):
        kept = choose_kept([*kept, *stream[start : start + 100]], KeptLimits(learn=200))
    place = {frame.key: number for number, (frame, _) in enumerate(stream)}
    places = [place[frame.key] for frame, _ in kept]
    assert len(places) == 200
    assert 430 < np.mean(places) < 570  # three deviations of the mean of 200 uniform draws: 61


def test_forgetting_leaves_hashes_and_no_pixels(tmp_path: Path) -> None:
    state = tmp_path / "state"
    write_samples(tmp_path / "a.npz", images(8), np.arange(8) % 2)
    held = pixels(tuned(state, tmp_path / "a.npz"), holdout=True)
    kept = KeptSamples(state, LINE)
    assert oct(kept.path.stat().st_mode)[-3:] == "600"
    assert kept.forget() == 8
    assert (kept.frames(), len(kept.index().parts)) == ([], 8)
    data = kept.path.read_bytes()
    assert not any(image.tobytes() in data for image in images(8))
    assert pixels(tuned(state, tmp_path / "a.npz"), holdout=True) == held


def test_nothing_is_written_again_when_nothing_is_new(tmp_path: Path) -> None:
    kept = KeptSamples(tmp_path, LINE)
    everything = frames({("a", False): 3, ("b", True): 2})
    kept.write(everything, {"k": True})
    before = kept.path.stat().st_ino
    kept.write(everything, {"k": True})
    assert kept.path.stat().st_ino == before
    assert kept.frames() == everything
    kept.write(everything[1:], {"k": True})
    assert kept.frames() == everything[1:]
    assert [path.name for path in kept.path.parent.iterdir()] == ["kept.zip"]


def test_of_too_many_hashes_the_oldest_learnt_ones_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kiridashi.kept.MAX_PARTS", 4)
    kept = KeptSamples(tmp_path, LINE)
    kept.write([], {"held": True, "one": False, "two": False, "three": False, "held too": True, "four": False})
    assert kept.index().parts == {"held": True, "three": False, "held too": True, "four": False}


def test_a_kept_frame_has_its_part_even_where_its_hash_was_dropped(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(16), np.arange(16) % 2)
    first = tuned(tmp_path / "state", tmp_path / "a.npz")
    kept = KeptSamples(tmp_path / "state", LINE)
    kept.write(kept.frames(), {})
    again = tuned(tmp_path / "state")
    assert again.parts == first.parts
    assert pixels(again, holdout=True) == pixels(first, holdout=True)


@pytest.mark.parametrize("damage", ["cut", "changed", "no zip", "other", "packed", "negative"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    kept = KeptSamples(tmp_path, LINE)
    kept.write(frames({("a", False): 3}), {"k": True})
    data = kept.path.read_bytes()
    if damage == "other":
        with zipfile.ZipFile(kept.path, "w") as archive:
            archive.writestr("index.json", b"{}")
    elif damage in ("packed", "negative"):
        side, way = (-4, zipfile.ZIP_STORED) if damage == "negative" else (4, zipfile.ZIP_DEFLATED)
        index = KeptIndex((KeptFrame("k", "a", False, side, side),))
        with zipfile.ZipFile(kept.path, "w") as archive:
            archive.writestr("index.json", msgspec.json.encode(index))
            archive.writestr("pixels.bin", bytes(48), way)
    else:
        place = data.index(bytes(40))
        changed = {"cut": data[:-9], "changed": data[:place] + b"\1" + data[place + 1 :], "no zip": b"x"}[damage]
        kept.path.write_bytes(changed)
    assert kept.frames() == []
    assert kept.path.with_name("kept.zip.damaged").exists()
    assert not kept.path.exists()


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("in the way")
    with pytest.raises(StateError, match="cannot be kept"):
        KeptSamples(tmp_path, LINE).write([], {})


def test_an_answer_for_what_is_no_frame_leads_nowhere(tmp_path: Path) -> None:
    folder = SpoolFolder(tmp_path, LINE)
    folder.prepare()
    (tmp_path / "seal.key").write_bytes(b"secret")
    AnswerLog(folder.answers_path).add(Answer("a1", "../../../seal.key", "class", 1.0, LABELS[0]))
    assert len(gather(Sources(spool=folder), LABELS, 6, 6).samples) == 0
    assert (tmp_path / "seal.key").read_bytes() == b"secret"


def test_whatever_bit_flips_in_the_file_it_is_read_or_set_aside(tmp_path: Path) -> None:
    kept, image = KeptSamples(tmp_path, "press-3"), bytes(12)
    kept.write([(KeptFrame(frame_key(2, 2, image), "dent", False, 2, 2), image)], {})
    sound = kept.path.read_bytes()
    for place in range(8 * len(sound)):
        flipped = bytearray(sound)
        flipped[place // 8] ^= 1 << place % 8
        kept.path.write_bytes(flipped)
        frames = kept.frames()
        assert len(frames) == 1 or not kept.path.exists()
