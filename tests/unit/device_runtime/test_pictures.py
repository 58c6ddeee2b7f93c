"""Pictures without an imaging library, held against one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi.errors import InputError
from kiridashi.pictures import MAX_FILE_BYTES, read_picture
from kiridashi.samples import read_samples
from PIL import Image

LABELS = ("good", "bad")


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = rng.integers(-3, 4, (height, width, channels)).cumsum(axis=1) + 128
    return np.clip(steps, 0, 255).astype(np.uint8)  # smooth rows make the encoder use every filter


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4), ("L", 1), ("LA", 2)])
def test_png_of_every_kind_is_what_pillow_reads(tmp_path: Path, mode: str, channels: int) -> None:
    pixels = noise(37, 23, channels)
    Image.fromarray(pixels if channels > 1 else pixels[:, :, 0], mode).save(tmp_path / "a.png")
    wanted = pixels[:, :, :3] if channels >= 3 else pixels[:, :, [0, 0, 0]]
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), wanted)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 20, 3)).convert("P")
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@given(kinds=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_row_filter_is_undone(tmp_path_factory: pytest.TempPathFactory, kinds: list[int], seed: int) -> None:
    import struct
    import zlib

    pixels = np.random.default_rng(seed).integers(0, 256, (len(kinds), 5, 3), dtype=np.uint8)
    rows, above = bytearray(), [0] * 15
    for kind, row in zip(kinds, pixels.reshape(len(kinds), -1).tolist(), strict=True):
        rows.append(kind)
        for n, value in enumerate(row):
            left, up, corner = (row[n - 3] if n > 2 else 0), above[n], (above[n - 3] if n > 2 else 0)
            base = left + up - corner
            nearest = min((left, up, corner), key=lambda guess: abs(base - guess))
            guess = (0, left, up, (left + up) // 2, nearest)[kind]
            rows.append((value - guess) % 256)
        above = row

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 5, len(kinds), 8, 2, 0, 0, 0)
    path = tmp_path_factory.mktemp("png") / "a.png"
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    np.testing.assert_array_equal(read_picture(path), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)


def test_ppm_and_npy(tmp_path: Path) -> None:
    pixels = noise(6, 9, 3)
    Image.fromarray(pixels).save(tmp_path / "a.ppm")
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.ppm", "a.npy"):
        np.testing.assert_array_equal(read_picture(tmp_path / name), pixels)


def test_what_cannot_be_read_is_named_and_says_what_to_do(tmp_path: Path) -> None:
    Image.fromarray(noise(30, 30, 3)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "photo.jpg")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    np.save(tmp_path / "float.npy", np.zeros((4, 4, 3), np.float32))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "changed.png").write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    (tmp_path / "empty.ppm").write_bytes(b"")
    names = {path.name for path in tmp_path.iterdir()} - {"whole.png"}
    for name in names:
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read_picture(tmp_path / name)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    Image.new("RGB", (16000, 16000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="out of range"):
        read_picture(tmp_path / "bomb.png")


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for number, label in enumerate(("good", "bad", "bad")):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(noise(6 + number, 7, 3, number)).save(tmp_path / label / f"{number}.png")
    packs = list(read_samples(tmp_path, LABELS))
    assert [int(pack.labels[0]) for pack in packs] == [1, 1, 0]
    assert [pack.images.shape[1] for pack in packs] == [7, 8, 6]
    (tmp_path / "odd").mkdir()
    with pytest.raises(InputError, match="unknown class 'odd'"):
        list(read_samples(tmp_path, LABELS))


def test_what_is_made_to_harm_is_refused_like_any_other(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(2))) + chunk(b"IEND", b"")
    (tmp_path / "no-palette.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels)
    np.savez(tmp_path / "archive", a=np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with (tmp_path / "boast.npy").open("wb") as file:
        claim = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 1, 3)}
        np.lib.format.write_array_header_1_0(file, claim)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match="cannot be read"):
            read_picture(path)
