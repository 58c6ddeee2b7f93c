"""Task folders as people make them, right and wrong."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from kiridashi_server.tasks import SPLITS, Limits, Task, TaskError, load_task, save_task_folder
from PIL import Image


def write_image(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten images each, no split files."""
    root = tmp_path / "press-3"
    for index in range(10):
        write_image(root / "good" / f"{index}.png", (10 * index, 200, 30))
        write_image(root / "scratch" / f"{index}.jpg", (200, 10 * index, 30))
    return root


def listed(folder: Path, **splits: list[str]) -> Path:
    for name, lines in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_folder_without_lists_is_dealt_by_seed(folder: Path) -> None:
    task = load_task(folder, image_size=32)
    assert task.name == "press-3"
    assert task.labels == ("good", "scratch")
    assert {name: len(samples) for name, samples in task.splits.items()} == {
        "train": 8,
        "val": 2,
        "tune": 4,
        "holdout": 2,
        "test": 4,
    }
    assert task.split("train").images.shape == (8, 32, 32, 3)
    assert load_task(folder, image_size=32).digest == task.digest
    assert load_task(folder, image_size=32, seed=1).split("train").sources != task.split("train").sources


def test_lists_are_followed(folder: Path) -> None:
    listed(folder, train=["# chosen by hand", "good/1.png", "", "scratch/2.jpg"], test=["scratch/3.jpg"])
    task = load_task(folder)
    assert task.split("train").sources == ("good/1.png", "scratch/2.jpg")
    assert task.split("test").labels.tolist() == [1]
    assert set(task.splits) == {"train", "test"}


def test_images_of_one_part_stay_in_one_split(folder: Path) -> None:
    lines = [
        f"{label}/{i}.{ext}\tpart-{label}-{i // 2}"
        for label, ext in (("good", "png"), ("scratch", "jpg"))
        for i in range(10)
    ]
    (folder / "sources.txt").write_text("\n".join(lines), encoding="utf-8")
    task = load_task(folder)
    owners = [set(samples.sources) for samples in task.splits.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 10
    assert all(len(samples) == 4 for samples in task.splits.values())


def test_saved_folder_reads_back_with_the_same_digest(folder: Path, tmp_path: Path) -> None:
    task = load_task(folder, image_size=24)
    copy = tmp_path / "elsewhere" / "press-3"
    save_task_folder(task, copy)
    assert load_task(copy, image_size=24).digest == task.digest
    with pytest.raises(TaskError, match="not an empty folder"):
        save_task_folder(task, copy)


def test_a_label_that_is_no_folder_name_is_not_written(folder: Path, tmp_path: Path) -> None:
    task = load_task(folder)
    with pytest.raises(TaskError, match="cannot be the name"):
        save_task_folder(Task("t", ("..", "b"), task.splits), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 90, (90, 90, 90)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8000, (128, 128, 128)),
    ],
)
def test_every_colour_mode_becomes_rgb(folder: Path, mode: str, colour: object, expected: tuple[int, ...]) -> None:
    Image.new(mode, (8, 8), colour).save(folder / "good" / "0.png")
    listed(folder, train=["good/0.png", "scratch/0.jpg"])
    assert load_task(folder).split("train").images[0, 5, 5].tolist() == list(expected)


def test_orientation_of_a_camera_is_applied(folder: Path) -> None:
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 8))
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(folder / "good" / "0.png", exif=exif)
    listed(folder, train=["good/0.png", "scratch/0.jpg"])
    first = load_task(folder, image_size=16).split("train").images[0]
    assert first[2].max() == 0
    assert first[13].min() == 255


def test_one_class_only(tmp_path: Path) -> None:
    write_image(tmp_path / "t" / "good" / "0.png")
    with pytest.raises(TaskError, match="one class only") as caught:
        load_task(tmp_path / "t")
    assert caught.value.exit_code == 10


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="is not a folder"):
        load_task(tmp_path / "missing")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "good" / "7.png").write_bytes(content)
    with pytest.raises(TaskError, match=r"good/7\.png"):
        load_task(folder)


def test_a_truncated_image_is_named(folder: Path) -> None:
    file = folder / "scratch" / "4.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(TaskError, match=r"scratch/4\.jpg"):
        load_task(folder)


def test_another_format_under_a_known_name_is_refused(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "good" / "7.png", "GIF")
    with pytest.raises(TaskError, match=r"good/7\.png"):
        load_task(folder)


def test_an_empty_class_is_named(folder: Path) -> None:
    (folder / "dent").mkdir()
    with pytest.raises(TaskError, match="class 'dent' is empty"):
        load_task(folder)


def test_a_class_without_training_images_is_named(folder: Path) -> None:
    listed(folder, train=["good/0.png"], test=["scratch/0.jpg"])
    with pytest.raises(TaskError, match="class 'scratch' is empty in split 'train'"):
        load_task(folder)


def test_too_few_images_to_deal(folder: Path) -> None:
    write_image(folder / "dent" / "0.png")
    with pytest.raises(TaskError, match="class 'dent' has 1 images") as caught:
        load_task(folder)
    assert "train.txt" in caught.value.next_step


def test_a_stray_file_in_a_class_is_named(folder: Path) -> None:
    (folder / "good" / ".DS_Store").write_bytes(b"")
    (folder / "good" / "Thumbs.db").write_bytes(b"")
    load_task(folder)
    (folder / "good" / "frame.tiff").write_bytes(b"")
    with pytest.raises(TaskError, match=r"frame\.tiff is not an image"):
        load_task(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("good/99.png", r"train\.txt, line 2: there is no image 'good/99\.png'"),
        ("../other/0.png", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("good\\0.png", "leads out of"),
        ("good/../good/0.png", "leads out of"),
        ("good/0.png", r"already in train\.txt"),
    ],
)
def test_wrong_lines_of_a_list(folder: Path, line: str, message: str) -> None:
    listed(folder, train=["good/0.png", line, "scratch/0.jpg"])
    with pytest.raises(TaskError, match=message):
        load_task(folder)


def test_an_image_in_two_splits(folder: Path) -> None:
    listed(folder, train=["good/0.png", "scratch/0.jpg"], test=["good/0.png"])
    with pytest.raises(TaskError, match=r"test\.txt, line 1: 'good/0\.png' is already in train\.txt"):
        load_task(folder)


def test_a_list_that_is_no_text(folder: Path) -> None:
    (folder / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not UTF-8"):
        load_task(folder)


@pytest.mark.parametrize("where", ["good/0.png", "good", "train.txt", "sources.txt"])
def test_links_are_refused(folder: Path, tmp_path: Path, where: str) -> None:
    target = tmp_path / "outside"
    if where == "good":
        target.mkdir()
    else:
        write_image(target.with_suffix(".png"))
        target = target.with_suffix(".png")
    link = folder / (where if where != "good" else "linked")
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    with pytest.raises(TaskError, match=r"symbolic link|not a plain file"):
        load_task(folder)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header names a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(folder: Path, side: int) -> None:
    (folder / "good" / "3.png").write_bytes(png_that_claims(side, side))
    with pytest.raises(TaskError, match=r"good/3\.png"):
        load_task(folder)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_files=19),
        Limits(max_classes=1),
        Limits(max_pixels=300),
        Limits(max_file_bytes=10),
        Limits(max_task_bytes=1000),
    ],
)
def test_limits_hold(folder: Path, limits: Limits) -> None:
    with pytest.raises(TaskError):
        load_task(folder, limits=limits)


def test_limits_allow_what_is_just_inside(folder: Path) -> None:
    limits = Limits(max_files=20, max_classes=2, max_pixels=320, max_task_bytes=20 * 8 * 8 * 3)
    assert set(load_task(folder, image_size=8, limits=limits).splits) == set(SPLITS)


@pytest.mark.parametrize("size", [0, 7, 1025])
def test_image_sizes_have_limits(folder: Path, size: int) -> None:
    with pytest.raises(TaskError, match="image size"):
        load_task(folder, image_size=size)


def test_the_whole_frame_is_kept(folder: Path) -> None:
    """Nothing is cropped away from a frame that is not square."""
    wide = np.zeros((20, 80, 3), dtype=np.uint8)
    wide[:, :8], wide[:, -8:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(wide).save(folder / "good" / "0.png")
    listed(folder, train=["good/0.png", "scratch/0.jpg"])
    first = load_task(folder, image_size=40).split("train").images[0]
    assert first[20, 1].tolist() == [255, 0, 0]
    assert first[20, -2].tolist() == [0, 0, 255]
