"""Build a pack of tasks from drawings in packages of the npm registry.

    python scripts/build_tasks.py [RECIPE] [--packages DIR] [--out FILE]

``shipped_tasks.toml`` (the default) makes the tasks that come with Kiridashi, ``oneshot_tasks.toml`` those of the
benchmark of reuse. Downloads the packages with ``npm pack`` into a temporary folder (or takes the ``.tgz`` files from
``--packages``), checks each against the integrity value pinned in the recipe, chooses drawings as the recipe says, and
writes the pack and its SHA-256. The same packages give the same bytes with the same Pillow, libwebp and FreeType.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import msgspec
import numpy as np
from drawing_sources import CELL, Sources, Style
from kiridashi.artifacts import write_atomic
from kiridashi_server.tasks.drawings import DIGEST_SUFFIX, FORMAT, RECIPE, Drawing, Recipe, TaskRecipe, sheet_name
from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.packed import encode_image, write_archive
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.task import SplitName
from numpy.typing import NDArray
from PIL import Image
from task_world import TaskSpec, World, draw

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, SEED = 12, 0
QUALITY, ALPHA_QUALITY = 70, 85
SAME_DRAWING_RMS = 2.0
"""Drawings of a class that differ by less (grey levels, at 32 px on grey) count as one: the second is not used."""


class ListedTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task whose classes are lists of short names."""

    counts: dict[SplitName, int]
    classes: dict[str, list[str]]


class PackRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pack is made of: listed tasks, or tasks drawn from a world. ``pack`` is the file, from the repository."""

    pack: str
    max_bytes: int
    styles: list[Style]
    tasks: dict[str, ListedTask] = {}
    world: World | None = None


def specs(sources: Sources, recipe: PackRecipe) -> dict[str, TaskSpec]:
    """What every task of the pack is made of."""
    if recipe.world is not None:
        return draw(sources, recipe.world)
    return {
        name: TaskSpec(task.counts, {label: [*map(sources.variants, of)] for label, of in task.classes.items()})
        for name, task in recipe.tasks.items()
    }


def candidates(task: str, label: str, pictograms: list[list[str]]) -> Iterator[str]:
    """A class's drawings in a fixed random order that takes its pictograms in turn."""
    generator = generator_for(SEED, "order", task, label)
    order = generator.permutation(len(pictograms))
    queues = [generator.permutation(pictograms[place]).tolist() for place in order]
    for turn in zip_longest(*queues):
        yield from (name for name in turn if name is not None)


def choose(sources: Sources, task: str, label: str, spec: TaskSpec, count: int) -> list[str]:
    """The first ``count`` candidates that are visibly different from each other in every style."""
    chosen: list[str] = []
    looks: list[NDArray[np.float64]] = []
    for name in candidates(task, label, spec.classes[label]):
        look = np.stack([sources.look(style, name) for style in sources.of_kind(spec.kind)])
        if all(np.sqrt(((look - other) ** 2).mean(axis=1)).min() >= SAME_DRAWING_RMS for other in looks):
            chosen.append(name)
            looks.append(look)
        if len(chosen) == count:
            return chosen
    raise TaskError(f"class '{label}' of '{task}' has {len(chosen)} different drawings; {count} are needed")


def deal(chosen: list[str], spec: TaskSpec, splits: list[SplitName]) -> Iterator[tuple[SplitName, str]]:
    """Consecutive drawings to consecutive splits."""
    start = 0
    for split in splits:
        for name in chosen[start : start + spec.counts[split]]:
            yield split, name
        start += spec.counts[split]


def build_task(sources: Sources, name: str, spec: TaskSpec) -> tuple[TaskRecipe, dict[str, bytes]]:
    """A task's recipe and its sheets."""
    splits = {style: sources.styles[style].splits for style in sources.of_kind(spec.kind)}
    needed = max(sum(spec.counts[split] for split in of_style) for of_style in splits.values())
    styles: dict[str, list[Drawing]] = {style: [] for style in splits}
    for number, label in enumerate(sorted(spec.classes)):
        chosen = choose(sources, name, label, spec, needed)
        for style, drawings in styles.items():
            drawings += [Drawing(number, split, drawing) for split, drawing in deal(chosen, spec, splits[style])]
    sheets = {sheet_name(name, style): build_sheet(sources, style, drawings) for style, drawings in styles.items()}
    return TaskRecipe(name, sorted(spec.classes), styles, spec.role, spec.area, spec.pool), sheets


def build_sheet(sources: Sources, style: str, drawings: list[Drawing]) -> bytes:
    """The drawings, row by row, as one WebP file."""
    rows = -(-len(drawings) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for index, drawing in enumerate(drawings):
        sheet.paste(sources.drawing(style, drawing.name), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    return encode_image(sheet, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6)


def refuse_shared(tasks: list[TaskRecipe]) -> None:
    """Refuse a drawing that stands in two classes or two tasks."""
    owner: dict[str, tuple[str, str]] = {}
    for task in tasks:
        for drawings in task.styles.values():
            for drawing in drawings:
                place = (task.name, task.labels[drawing.label])
                if owner.setdefault(drawing.name, place) != place:
                    raise TaskError(f"{drawing.name} stands in {place} and {owner[drawing.name]}")


def build(folder: Path, recipe: PackRecipe) -> bytes:
    """The pack's bytes, from a folder with the packages."""
    sources = Sources(folder, recipe.styles)
    entries: dict[str, bytes] = {}
    tasks = []
    for name, spec in specs(sources, recipe).items():
        task, sheets = build_task(sources, name, spec)
        tasks.append(task)
        entries |= sheets
        count, size = sum(map(len, task.styles.values())), sum(map(len, sheets.values()))
        print(f"{name:14s} {task.role:12s} {task.area:12s} {count:4d} drawings {size:8d} bytes")
    refuse_shared(tasks)
    described = Recipe(FORMAT, CELL, COLUMNS, [style.origin for style in recipe.styles], tasks)
    data = write_archive({RECIPE: msgspec.json.encode(described), **entries})
    if len(data) > recipe.max_bytes:
        raise TaskError(f"the pack has {len(data)} bytes; {recipe.max_bytes} are allowed")
    return data


def download(folder: Path, styles: list[Style]) -> None:
    """Fetch the pinned packages with npm."""
    for style in styles:
        command = ["npm", "pack", "--silent", f"{style.package}@{style.version}"]
        subprocess.run(command, cwd=folder, check=True, timeout=300)


def read_recipe(file: Path) -> PackRecipe:
    """Read a pack's recipe.

    Raises:
        TaskError: it is not one.
    """
    try:
        return msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), PackRecipe)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise TaskError(f"{file} cannot be read as a pack's recipe", why=str(error)) from error


def main() -> None:
    """Build the pack and write it with its digest."""
    parser = argparse.ArgumentParser(description="Build a pack of tasks.")
    default = Path(__file__).parent / "shipped_tasks.toml"
    parser.add_argument("recipe", type=Path, nargs="?", default=default, help="default: that of the shipped tasks")
    parser.add_argument("--packages", type=Path, help="folder with the .tgz files; default: download them")
    parser.add_argument("--out", type=Path, help="the pack; default: as the recipe says")
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    out = arguments.out or ROOT / recipe.pack
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.packages is None:
            download(Path(temporary), recipe.styles)
        data = build(arguments.packages or Path(temporary), recipe)
    digest = hashlib.sha256(data).hexdigest()
    write_atomic(out, data)
    write_atomic(out.with_name(out.name + DIGEST_SUFFIX), f"{digest}  {out.name}\n".encode())
    print(f"{out}: {len(data)} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
