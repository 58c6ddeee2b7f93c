"""Packed tasks: same content, same bytes; a damaged or hostile file is refused."""

import io
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from kiridashi_server.tasks import Limits, Samples, Task, TaskError, load_packed, pack
from kiridashi_server.tasks.packed import read_archive, write_archive
from PIL import Image


def make_task(height: int = 16, width: int = 16, count: int = 40) -> Task:
    generator = np.random.default_rng(3)

    def part(prefix: str, number: int) -> Samples:
        images = generator.integers(0, 256, (number, height, width, 3), dtype=np.uint8)
        return Samples(images, np.arange(number, dtype=np.int64) % 2, tuple(f"{prefix}{i // 4}" for i in range(number)))

    return Task("プレス-3", ("良品", "scratch"), {"train": part("a", count), "test": part("b", 6)})


@pytest.mark.parametrize(("height", "width", "count"), [(16, 16, 40), (12, 20, 7), (512, 512, 20)])
def test_round_trip_keeps_the_digest(tmp_path: Path, height: int, width: int, count: int) -> None:
    task = make_task(height, width, count)
    pack(task, tmp_path / "task.kiri")
    again = load_packed(tmp_path / "task.kiri")
    assert again.digest == task.digest
    assert again.labels == task.labels


def test_same_task_same_bytes(tmp_path: Path) -> None:
    pack(make_task(), tmp_path / "a")
    pack(make_task(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_packed_without_images(tmp_path: Path) -> None:
    task = make_task()
    object.__setattr__(task, "splits", {})
    with pytest.raises(TaskError, match="no images"):
        pack(task, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nowhere"):
        load_packed(tmp_path / "nowhere")


def test_every_changed_byte_of_a_sheet_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "task"
    pack(make_task(count=4), file)
    data = file.read_bytes()
    start = data.index(b"RIFF")
    for position in range(start, start + 400, 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :])
        with pytest.raises(TaskError, match="cannot be read"):
            load_packed(file)


@pytest.mark.parametrize("keep", [0, 10, 500, -30])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "task"
    pack(make_task(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TaskError, match="cannot be read"):
        load_packed(file)


def change(file: Path, **fields: object) -> None:
    """Rewrite a packed task with changed fields of its description."""
    entries = read_archive(file.read_bytes())
    description = msgspec.json.decode(entries["task.json"]) | fields
    file.write_bytes(write_archive(entries | {"task.json": msgspec.json.encode(description)}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "kiridashi-task-9"}, "format"),
        ({"height": 2000}, "image size"),
        ({"height": 17}, "pixels where"),
        ({"splits": [{"name": "train", "labels": [0, 1], "sources": ["x"]}]}, "sources"),
        ({"splits": [{"name": "train", "labels": [2**70], "sources": ["x"]}]}, "cannot be read"),
        ({"splits": [{"name": "../x", "labels": [0], "sources": ["x"]}]}, "cannot be read"),
        ({"splits": [{"name": "val", "labels": [0], "sources": ["x"]}]}, "cannot be read"),
        ({"splits": [{"name": "test", "labels": [0] * 30_000, "sources": ["x"] * 30_000}]}, "the limit is"),
        ({"more": 1}, "unknown field"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    file = tmp_path / "task"
    pack(make_task(), file)
    change(file, **fields)
    with pytest.raises(TaskError, match=message):
        load_packed(file)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    """A small file must not grow when it is opened."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("task.json", b" " * 10_000_000)
    (tmp_path / "bomb").write_bytes(buffer.getvalue())
    with pytest.raises(TaskError, match="compressed"):
        load_packed(tmp_path / "bomb")


def test_a_sheet_of_another_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "task"
    pack(make_task(), file)
    entries = read_archive(file.read_bytes())
    larger = io.BytesIO()
    Image.new("RGB", (2048, 32)).save(larger, "WEBP", lossless=True)
    file.write_bytes(write_archive(entries | {"train/000.webp": larger.getvalue()}))
    with pytest.raises(TaskError, match="pixels where"):
        load_packed(file)


def test_limits_hold(tmp_path: Path) -> None:
    pack(make_task(), tmp_path / "task")
    with pytest.raises(TaskError):
        load_packed(tmp_path / "task", Limits(max_files=45))
    with pytest.raises(TaskError):
        load_packed(tmp_path / "task", Limits(max_task_bytes=1000))
    load_packed(tmp_path / "task", Limits(max_files=46))
