"""Packs of drawings, and tasks rendered from them: drawings in several styles, seen by a simulated camera.

A pack holds drawings and a recipe, not samples: samples are rendered when a task is loaded, from a seed. What a sample
shows is fixed by the recipe: which drawing, in which style, belongs to which split. Rendered bytes, and so
``Task.digest``, depend on the pack, the arguments, and the versions of NumPy and Pillow.

``scripts/build_tasks.py`` builds packs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable

import msgspec
import numpy as np
from PIL import Image

from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.packed import check_image_size, decode_sheet, read_archive
from kiridashi_server.tasks.scenes import render
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.task import Samples, SplitName, Task

FORMAT = "kiridashi-drawings-1"
RECIPE, DIGEST_SUFFIX = "recipe.json", ".sha256"


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


class TaskRecipe(msgspec.Struct, frozen=True, omit_defaults=True):
    """A task: labels, and by style the drawings in the order of their sheet's cells, row by row.

    A benchmark's task also has a ``role`` in it; its classes were drawn from a ``pool`` of kindred drawings, which
    belongs to an ``area``.
    """

    name: str
    labels: list[str]
    styles: dict[str, list[Drawing]]
    role: str = ""
    area: str = ""
    pool: str = ""


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


@dataclass(frozen=True, eq=False)
class Pack:
    """An opened pack: what it holds, and its sheets by entry."""

    recipe: Recipe
    sheets: Mapping[str, bytes]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in the pack's order."""
        return tuple(task.name for task in self.recipe.tasks)

    def task(self, name: str) -> TaskRecipe:
        """The recipe of a task.

        Raises:
            TaskError: no such task.
        """
        for task in self.recipe.tasks:
            if task.name == name:
                return task
        raise TaskError(f"there is no task '{name}' in the pack", why=f"there are: {', '.join(self.names)}")


def open_pack(folder: Traversable, file: str, next_step: str) -> Pack:
    """Read a pack, after its SHA-256 was compared with the one in ``FILE.sha256`` beside it.

    Args:
        folder: where both are.
        file: the pack's name.
        next_step: what to do if it cannot be read.

    Raises:
        TaskError: the pack or its digest is missing or damaged, or of another format.
    """
    try:
        data = (folder / file).read_bytes()
        expected = (folder / f"{file}{DIGEST_SUFFIX}").read_text(encoding="ascii").split()[0]
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("its SHA-256 is not the expected one")
        entries = read_archive(data)
        recipe = msgspec.json.decode(entries.pop(RECIPE), type=Recipe)
        if recipe.format != FORMAT:
            raise ValueError(f"its format is '{recipe.format}', this version reads '{FORMAT}'")
    except (OSError, IndexError, KeyError, ValueError, msgspec.MsgspecError) as error:
        raise TaskError(f"the pack {file} cannot be read", why=str(error), next_step=next_step) from error
    return Pack(recipe, entries)


def render_task(pack: Pack, name: str, image_size: int, seed: int, views: Views) -> Task:
    """Render a task. A sample's source is ``style/drawing``, what it shows.

    Each sample has a random stream of its own, from the seed, the task, the drawing and the number of the view: more
    views do not change the first ones.

    Args:
        pack: where the task is.
        name: one of its names.
        image_size: side of the images in pixels.
        seed: of backgrounds and views; which drawing is in which split does not depend on it.
        views: how many samples to render.

    Raises:
        TaskError: no such task, a damaged sheet, or an image size that cannot be used.
    """
    check_image_size(image_size)
    task = pack.task(name)
    cells = {style: _cells(pack, task, style) for style in task.styles}
    names: set[SplitName] = {drawing.split for drawings in task.styles.values() for drawing in drawings}
    splits = {split: _render_split(task, split, cells, (image_size, seed), views) for split in names}
    return Task(name, tuple(task.labels), splits)


def _cells(pack: Pack, task: TaskRecipe, style: str) -> list[Image.Image]:
    """A style's drawings, RGBA, in the recipe's order."""
    count, side, columns = len(task.styles[style]), pack.recipe.cell, pack.recipe.columns
    rows = math.ceil(count / columns)
    sheet = decode_sheet(pack.sheets[sheet_name(task.name, style)], (columns * side, rows * side), "RGBA")
    grid = sheet.reshape(rows, side, columns, side, 4).swapaxes(1, 2).reshape(-1, side, side, 4)
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
