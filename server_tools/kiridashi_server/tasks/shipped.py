"""The tasks that come with Kiridashi: pictograms in three drawing styles, seen by a simulated camera.

The package holds drawings and a recipe, not samples: samples are rendered when a task is loaded, from a seed. What a
sample shows is fixed by the recipe: which drawing, in which style, belongs to which split. Server splits (train, val)
use two styles; the device's splits (tune, holdout, test) a third that the server never sees. Rendered bytes, and so
``Task.digest``, depend on the pack, the arguments, and the versions of NumPy and Pillow.

Sources and licences of the drawings: ``data/NOTICE.md``. ``scripts/build_tasks.py`` rebuilds the pack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import msgspec
import numpy as np
from PIL import Image

from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.packed import check_image_size, decode_sheet, read_archive
from kiridashi_server.tasks.scenes import render
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.task import Samples, SplitName, Task

FORMAT = "kiridashi-drawings-1"
PACK, PACK_DIGEST, RECIPE = "shipped.zip", "shipped.zip.sha256", "recipe.json"


class Drawing(msgspec.Struct, frozen=True, array_like=True):
    """One drawing in one style: its class number, the split it belongs to, and its code points."""

    label: int
    split: SplitName
    name: str


class Package(msgspec.Struct, frozen=True):
    """Where a style's drawings come from."""

    style: str
    package: str
    version: str
    integrity: str
    licence: str


class TaskRecipe(msgspec.Struct, frozen=True):
    """A shipped task: labels, and by style the drawings in the order of their sheet's cells, row by row."""

    name: str
    labels: list[str]
    styles: dict[str, list[Drawing]]


class Recipe(msgspec.Struct, frozen=True):
    """What the pack holds. ``cell`` is a drawing's side in pixels, ``columns`` the cells in a sheet's row."""

    format: str
    cell: int
    columns: int
    packages: list[Package]
    tasks: list[TaskRecipe]


@dataclass(frozen=True)
class Views:
    """How many samples are rendered.

    ``train``, ``val``, ``tune`` and ``holdout`` are views of each drawing in each of the split's styles.
    ``test_per_class`` is reached or just passed by equal numbers of views of the class's test drawings.
    """

    train: int = 2
    val: int = 2
    tune: int = 3
    holdout: int = 4
    test_per_class: int = 24

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.tune, self.holdout, self.test_per_class) < 1:
            raise TaskError("every split needs at least one view", why=f"got {self}")

    def of(self, split: SplitName, drawings_of_class: int) -> int:
        """Views of each of a class's drawings in a split."""
        if split == "test":
            return math.ceil(self.test_per_class / drawings_of_class)
        return {"train": self.train, "val": self.val, "tune": self.tune, "holdout": self.holdout}[split]


DEFAULT_VIEWS = Views()


def shipped_names() -> tuple[str, ...]:
    """Names of the shipped tasks, in the pack's order.

    Raises:
        TaskError: the pack is missing or damaged.
    """
    return tuple(task.name for task in _open_pack()[0].tasks)


def load_shipped(name: str, image_size: int = 64, seed: int = 0, views: Views = DEFAULT_VIEWS) -> Task:
    """Render a shipped task. A sample's source is ``style/code-points``, the drawing it shows.

    Each sample has a random stream of its own, from the seed, the task, the drawing and the number of the view: more
    views do not change the first ones.

    Args:
        name: one of :func:`shipped_names`.
        image_size: side of the images in pixels.
        seed: of backgrounds and views; which drawing is in which split does not depend on it.
        views: how many samples to render.

    Raises:
        TaskError: no such task, or the pack is missing or damaged.
    """
    check_image_size(image_size)
    recipe, entries = _open_pack()
    task = next((task for task in recipe.tasks if task.name == name), None)
    if task is None:
        raise TaskError(
            f"there is no shipped task '{name}'",
            why=f"there are: {', '.join(task.name for task in recipe.tasks)}",
        )
    cells = {style: _cells(recipe, task, style, entries) for style in task.styles}
    names: set[SplitName] = {drawing.split for drawings in task.styles.values() for drawing in drawings}
    splits = {split: _render_split(task, split, cells, (image_size, seed), views) for split in names}
    return Task(name, tuple(task.labels), splits)


def _open_pack() -> tuple[Recipe, dict[str, bytes]]:
    """The recipe and the sheets, after the pack's SHA-256 was compared with the one shipped beside it."""
    folder = files("kiridashi_server.tasks") / "data"
    try:
        data = (folder / PACK).read_bytes()
        expected = (folder / PACK_DIGEST).read_text(encoding="ascii").split()[0]
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("its SHA-256 is not the expected one")
        entries = read_archive(data)
        recipe = msgspec.json.decode(entries.pop(RECIPE), type=Recipe)
        if recipe.format != FORMAT:
            raise ValueError(f"its format is '{recipe.format}', this version reads '{FORMAT}'")
    except (OSError, IndexError, KeyError, ValueError, msgspec.MsgspecError) as error:
        raise TaskError(
            f"the shipped tasks ({PACK}) cannot be read",
            why=str(error),
            next_step="install kiridashi again, or run scripts/build_tasks.py",
        ) from error
    return recipe, entries


def _cells(recipe: Recipe, task: TaskRecipe, style: str, entries: Mapping[str, bytes]) -> list[Image.Image]:
    """A style's drawings, RGBA, in the recipe's order."""
    count, side = len(task.styles[style]), recipe.cell
    rows = math.ceil(count / recipe.columns)
    sheet = decode_sheet(entries[sheet_name(task.name, style)], (recipe.columns * side, rows * side), "RGBA")
    grid = sheet.reshape(rows, side, recipe.columns, side, 4).swapaxes(1, 2).reshape(-1, side, side, 4)
    return [Image.fromarray(np.ascontiguousarray(grid[index])) for index in range(count)]


def sheet_name(task: str, style: str) -> str:
    """The entry of the pack that holds a task's drawings in one style."""
    return f"{task}/{style}.webp"


def _render_split(
    task: TaskRecipe, split: SplitName, cells: Mapping[str, list[Image.Image]], size_seed: tuple[int, int], views: Views
) -> Samples:
    """All samples of a split, by class, then style, drawing and view."""
    size, seed = size_seed
    chosen = [
        (drawing.label, style, drawing.name, cells[style][index])
        for style, drawings in task.styles.items()
        for index, drawing in enumerate(drawings)
        if drawing.split == split
    ]
    per_class = np.bincount([label for label, *_ in chosen], minlength=len(task.labels))
    images, labels, sources = [], [], []
    for label, style, drawing, cell in sorted(chosen, key=lambda item: item[0]):
        for view in range(views.of(split, int(per_class[label]))):
            generator = generator_for(seed, task.name, style, drawing, view)
            images.append(render(cell, size, generator))
            labels.append(label)
            sources.append(f"{style}/{drawing}")
    return Samples(np.stack(images), np.asarray(labels, dtype=np.int64), tuple(sources))
