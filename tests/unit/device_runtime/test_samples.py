from __future__ import annotations

from pathlib import Path

import kiridashi.samples as module
import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi.gathering import Sources, gather
from kiridashi.samples import write_samples

LABELS = ("good", "bad", "odd")


def images(count: int, seed: int = 0, side: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def load(folder: Path) -> module.Samples:
    return gather(Sources(folder), LABELS, 6, 6).samples


def test_names_and_indices_mean_the_same(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(3), ["bad", "good", "odd"])
    write_samples(tmp_path / "b.npz", images(2, seed=1), np.array([1, 0]))
    samples = load(tmp_path)
    assert samples.labels.tolist() == [1, 0, 2, 1, 0]
    np.testing.assert_array_equal(samples.images[:3], images(3))


def test_frames_of_another_size_are_resized(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(2, side=9), np.array([0, 1]))
    assert load(tmp_path).images.shape == (2, 6, 6, 3)


def test_hold_out_is_balanced_and_depends_on_content_only(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], [8, 8, 2])
    write_samples(tmp_path / "one" / "a.npz", images(18), labels)
    order = np.random.default_rng(5).permutation(18)
    write_samples(tmp_path / "two" / "z.npz", images(18)[order[:7]], labels[order[:7]])
    write_samples(tmp_path / "two" / "b.npz", images(18)[order[7:]], labels[order[7:]])
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert [int(one.holdout[one.labels == c].sum()) for c in range(3)] == [2, 2, 1]

    def held(samples: module.Samples) -> set[bytes]:
        return {image.tobytes() for image in samples.part(holdout=True).images}

    assert held(one) == held(two)


def test_flags_of_the_user_are_kept(tmp_path: Path) -> None:
    flags = np.array([True, False, False, True])
    write_samples(tmp_path / "a.npz", images(4), np.array([0, 1, 0, 1]), flags)
    assert load(tmp_path).holdout.tolist() == flags.tolist()


def test_a_copy_of_a_hold_out_frame_is_not_learnt_from(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(2), np.array([0, 1]))
    write_samples(tmp_path / "b.npz", images(1), np.array([0]), np.array([True]))
    samples = load(tmp_path)
    assert len(samples) == 2
    assert images(1)[0].tobytes() not in {image.tobytes() for image in samples.part(holdout=False).images}


def test_one_frame_under_two_classes_is_refused(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(1), np.array([0]))
    write_samples(tmp_path / "b.npz", images(1), np.array([2]))
    with pytest.raises(InputError, match="'good' and 'odd'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images(2)}, "no array 'labels'"),
        ({"images": images(2), "labels": np.array([0])}, "one entry for each of 2"),
        ({"images": images(2).astype(np.float32), "labels": np.array([0, 1])}, "must be uint8"),
        ({"images": images(2), "labels": np.array([0, 7])}, "outside 0 … 2"),
        ({"images": images(2), "labels": np.array(["good", "ugly"])}, "unknown class 'ugly'"),
        ({"images": images(2), "labels": np.array([0, 1]), "holdout": np.array([0, 1])}, "not bool"),
        ({"images": images(2), "labels": np.array([0, None], dtype=object)}, "cannot be read"),
        ({"images": images(2), "labels": np.array([0.0, 1.0])}, "unknown class"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "a.npz" in str(caught.value)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.npz", images(4), np.array([0, 1, 0, 1]))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[120] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)


def test_limits_are_checked_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((400, 64, 64, 3), np.uint8), labels=np.zeros(400, int))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 1_000_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(InputError, match="over 1000000 bytes"):
        load(tmp_path)


def test_too_many_files_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="holds no samples"):
        load(tmp_path / "nowhere")
    monkeypatch.setattr(module, "MAX_FILES", 1)
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.npz", images(1), np.array([0]))
    with pytest.raises(InputError, match="the limit is 1"):
        load(tmp_path)


def test_a_byte_that_changed_is_never_more_than_an_unreadable_file(tmp_path: Path) -> None:
    write_samples(tmp_path / "whole.npz", images(4), np.array([0, 1, 2, 0]))
    whole, refused = (tmp_path / "whole.npz").read_bytes(), 0
    for place in range(0, len(whole), 5):
        (tmp_path / "changed.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            list(module.read_samples(tmp_path / "changed.npz", LABELS))
        except InputError:
            refused += 1
    assert refused > 20
