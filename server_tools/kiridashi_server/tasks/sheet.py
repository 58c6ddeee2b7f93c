"""A picture of a task: some samples of every class, split by split."""

from __future__ import annotations

from pathlib import Path

from kiridashi.artifacts import write_atomic
from PIL import Image, ImageDraw, ImageFont

from kiridashi_server.tasks.packed import encode_image
from kiridashi_server.tasks.task import Samples, Task

_GAP, _MARGIN, _TEXT = 3, 12, 13
_PAPER, _INK, _FAINT = (250, 250, 247), (35, 35, 38), (120, 120, 125)


def contact_sheet(task: Task, path: Path | str, per_split: int = 3, cell: int = 64, seed: int = 0) -> None:
    """Write a PNG with a row for each class and a group of columns for each split.

    The samples shown are spread over the class's sources; a class with fewer than ``per_split`` of them leaves the
    rest of its cells empty.

    Args:
        task: what to show.
        path: the PNG file; replaced atomically.
        per_split: samples of each class in each split.
        cell: side of a shown image, in pixels.
        seed: chooses the samples.
    """
    font = ImageFont.load_default(size=_TEXT)
    left = _MARGIN + max(int(font.getlength(label)) for label in task.labels) + _MARGIN
    top = _MARGIN + 2 * _TEXT
    group = per_split * (cell + _GAP) + _MARGIN
    size = (left + group * len(task.splits), top + len(task.labels) * (cell + _GAP) + _MARGIN)
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for row, label in enumerate(task.labels):
        draw.text((_MARGIN, top + row * (cell + _GAP) + (cell - _TEXT) // 2), label, fill=_INK, font=font)
    for column, (name, samples) in enumerate(task.splits.items()):
        x = left + column * group
        draw.text((x, _MARGIN), name, fill=_INK, font=font)
        draw.text((x + font.getlength(name + "  "), _MARGIN), str(len(samples)), fill=_FAINT, font=font)
        for row in range(len(task.labels)):
            for place, image in enumerate(_examples(samples, row, per_split, seed)):
                shown = image.resize((cell, cell), Image.Resampling.LANCZOS)
                page.paste(shown, (x + place * (cell + _GAP), top + row * (cell + _GAP)))
    write_atomic(Path(path), encode_image(page, "PNG"))


def _examples(samples: Samples, label: int, count: int, seed: int) -> list[Image.Image]:
    of_class = samples.take((samples.labels == label).nonzero()[0])
    if not len(of_class):
        return []
    chosen = of_class.few_shot(min(count, len(of_class)), seed)
    return [Image.fromarray(image) for image in chosen.images]
