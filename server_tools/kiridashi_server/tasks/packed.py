"""A task as one compact file: a ZIP archive of lossless WebP sheets and one JSON description.

The same task always gives the same bytes with the same Pillow: entries are stored in a fixed order, uncompressed (the
sheets already are compressed), with a fixed time. Nothing in the file is ever executed, and nothing is decoded before
its size is known and allowed.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from kiridashi.artifacts import write_atomic
from numpy.typing import NDArray
from PIL import Image

from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.images import DEFAULT_LIMITS, Limits
from kiridashi_server.tasks.task import Samples, SplitName, Task

FORMAT = "kiridashi-task-1"
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
_DESCRIPTION = "task.json"
_SHEET_PIXELS = 2048
_EPOCH = (1980, 1, 1, 0, 0, 0)


class _Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: SplitName
    labels: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
    sources: list[str]


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    name: str
    labels: list[str]
    height: int
    width: int
    splits: list[_Split]


def check_image_size(size: int) -> None:
    """Refuse sides that no model here takes.

    Raises:
        TaskError: the size is not between 8 and 1024 pixels.
    """
    if not MIN_IMAGE_SIZE <= size <= MAX_IMAGE_SIZE:
        raise TaskError(
            f"an image size of {size} pixels cannot be used",
            why=f"sizes are {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}",
        )


def check_volume(count: int, height: int, width: int, limits: Limits) -> None:
    """Refuse a task before its images are decoded.

    Raises:
        TaskError: too many images, or too many bytes of them at uint8 [count, height, width, 3].
    """
    if count > limits.max_files:
        raise TaskError(f"a task of {count} images cannot be used", why=f"the limit is {limits.max_files}")
    if count * height * width * 3 > limits.max_task_bytes:
        raise TaskError(
            f"a task of {count} images of {height} x {width} pixels cannot be used",
            why=f"together they are over {limits.max_task_bytes // 2**20} MiB",
            next_step="choose a smaller image size or fewer images",
        )


def pack(task: Task, file: Path | str) -> None:
    """Write a task to one file, atomically. :func:`load_packed` gives back the same digest.

    Raises:
        TaskError: the task has no images.
    """
    if not task.splits:
        raise TaskError(f"task '{task.name}' has no images to pack")
    height, width = next(iter(task.splits.values())).images.shape[1:3]
    described = [_Split(n, s.labels.tolist(), list(s.sources)) for n, s in task.splits.items()]
    description = _Description(FORMAT, task.name, list(task.labels), height, width, described)
    entries = {_DESCRIPTION: msgspec.json.encode(description)}
    for name, samples in task.splits.items():
        for index, batch in enumerate(_batches(len(samples), height, width)):
            sheet = _to_sheet(samples.images[batch], _columns(width))
            entries[f"{name}/{index:03d}.webp"] = encode_image(Image.fromarray(sheet), "WEBP", lossless=True)
    write_atomic(Path(file), write_archive(entries))


def load_packed(file: Path | str, limits: Limits = DEFAULT_LIMITS) -> Task:
    """Read a file written by :func:`pack`.

    Raises:
        TaskError: the file is missing, damaged, over the limits, or not a packed task.
    """
    path = Path(file)
    try:
        if path.stat().st_size > limits.max_task_bytes:
            raise ValueError(f"it is larger than {limits.max_task_bytes // 2**20} MiB, which is the limit")
        entries = read_archive(path.read_bytes())
        description = msgspec.json.decode(entries.pop(_DESCRIPTION), type=_Description)
        _check_description(description, limits)
        splits = {part.name: _read_split(part, description, entries) for part in description.splits}
    except (OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
        raise TaskError(
            f"{path} cannot be read as a packed task",
            why=str(error),
            next_step="pack the task again from its folder",
        ) from error
    return Task(description.name, tuple(description.labels), splits)


def write_archive(entries: Mapping[str, bytes]) -> bytes:
    """A ZIP archive with these entries, in this order, whose bytes depend on nothing else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return buffer.getvalue()


def read_archive(data: bytes) -> dict[str, bytes]:
    """All entries of an archive written by :func:`write_archive`; they are stored, so they cannot grow.

    Raises:
        ValueError: not such an archive, a compressed entry, or a checksum that does not hold.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it has a compressed entry; packed tasks have none")
            return {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(str(error)) from error


def encode_image(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image file's bytes in a Pillow format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode_sheet(data: bytes, size: tuple[int, int], mode: str) -> NDArray[np.uint8]:
    """Decode a WebP sheet whose (width, height) is known beforehand: uint8 [H, W, channels of ``mode``].

    Raises:
        ValueError: it is not WebP, or has another size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            if image.size != size:
                raise ValueError(f"a sheet has {image.size} pixels where {size} were described")
            return np.asarray(image.convert(mode), dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"a sheet cannot be decoded: {error}") from error


def _check_description(description: _Description, limits: Limits) -> None:
    if description.format != FORMAT:
        raise ValueError(f"its format is '{description.format}', this version reads '{FORMAT}'")
    check_image_size(description.height)
    check_image_size(description.width)
    check_volume(sum(len(part.labels) for part in description.splits), description.height, description.width, limits)
    if len({part.name for part in description.splits}) != len(description.splits):
        raise ValueError("a split is described twice")


def _read_split(part: _Split, description: _Description, entries: Mapping[str, bytes]) -> Samples:
    height, width = description.height, description.width
    columns = _columns(width)
    images = np.zeros((len(part.labels), height, width, 3), dtype=np.uint8)
    for index, batch in enumerate(_batches(len(images), height, width)):
        count = len(images[batch])
        rows = math.ceil(count / columns)
        sheet = decode_sheet(entries[f"{part.name}/{index:03d}.webp"], (columns * width, rows * height), "RGB")
        cells = sheet.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
        images[batch] = cells.reshape(-1, height, width, 3)[:count]
    return Samples(images, np.asarray(part.labels, dtype=np.int64), tuple(part.sources))


def _columns(width: int) -> int:
    return max(1, _SHEET_PIXELS // width)


def _batches(count: int, height: int, width: int) -> Iterator[slice]:
    """Consecutive slices, as many images in each as one sheet of about 2048 x 2048 pixels holds."""
    step = _columns(width) * max(1, _SHEET_PIXELS // height)
    for start in range(0, count, step):
        yield slice(start, start + step)


def _to_sheet(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay images [N, H, W, C] out in rows of ``columns``; unused cells are zero: [rows*H, columns*W, C]."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    cells[:count] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)
