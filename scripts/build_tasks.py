"""Build the shipped tasks' pack from three pictogram packages of the npm registry.

    python scripts/build_tasks.py [--packages DIR] [--out DIR]

Downloads the packages with ``npm pack`` into a temporary folder (or takes the ``.tgz`` files from ``--packages``),
checks each against the integrity value pinned below, chooses drawings as ``shipped_tasks.toml`` says, and writes
``shipped.zip`` and ``shipped.zip.sha256``. The same packages give the same bytes with the same Pillow and libwebp.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import write_atomic
from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.packed import encode_image, write_archive
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.shipped import (
    FORMAT,
    PACK,
    PACK_DIGEST,
    RECIPE,
    Drawing,
    Package,
    Recipe,
    TaskRecipe,
    sheet_name,
)
from kiridashi_server.tasks.task import SplitName
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SERVER_STYLES, DEVICE_STYLE = ("noto", "fluent"), "twemoji"
SERVER_SPLITS: tuple[SplitName, ...] = ("train", "val")
DEVICE_SPLITS: tuple[SplitName, ...] = ("test", "tune", "holdout")
"""Order of dealing: what is tested on the device is what the server trained on, in a look it never saw."""

CELL, MARGIN, COLUMNS, SEED, MAX_PACK_BYTES = 48, 1, 12, 0, 2_000_000
QUALITY, ALPHA_QUALITY = 70, 85

NAMES = "package/emoji.json"
"""The list of short names and their code points, in the ``noto`` package."""

PACKAGES = (
    Package(
        "noto",
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Apache-2.0",
    ),
    Package(
        "fluent",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
    ),
    Package(
        "twemoji",
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "CC-BY-4.0",
    ),
)
MEMBERS = {
    "noto": "package/img/google/64/{}.png",
    "fluent": "package/assets/{}.webp",
    "twemoji": "package/img/twitter/64/{}.png",
}
SAME_DRAWING_RMS = 2.0
"""Drawings of a class that differ by less (grey levels, at 32 px on grey) count as one: the second is not used."""


class Sources:
    """The three packages, opened and verified."""

    def __init__(self, folder: Path) -> None:
        self._archives = {package.style: _open_package(folder, package) for package in PACKAGES}
        self._variants: dict[str, list[str]] = {}
        for entry in json.loads(self._read("noto", NAMES)):
            variants = [entry, *entry.get("skin_variations", {}).values()]
            self._variants[entry["short_name"]] = [Path(variant["image"]).stem for variant in variants]

    def variants(self, short_name: str) -> list[str]:
        """Code points of a short name and of its skin tones."""
        if short_name not in self._variants:
            raise TaskError(f"there is no pictogram '{short_name}'", next_step="correct shipped_tasks.toml")
        return self._variants[short_name]

    def drawing(self, style: str, name: str) -> Image.Image:
        """A drawing, RGBA, trimmed and centred in a square cell with a transparent margin."""
        image = Image.open(io.BytesIO(self._read(style, MEMBERS[style].format(name)))).convert("RGBA")
        trimmed = image.crop(image.getchannel("A").getbbox())
        scale = (CELL - 2 * MARGIN) / max(trimmed.size)
        width, height = (max(1, round(side * scale)) for side in trimmed.size)
        cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
        resized = trimmed.resize((width, height), Image.Resampling.LANCZOS)
        cell.paste(resized, ((CELL - width) // 2, (CELL - height) // 2))
        return cell

    def _read(self, style: str, member: str) -> bytes:
        archive, members = self._archives[style]
        file = archive.extractfile(members[member]) if member in members else None
        if file is None:
            raise TaskError(f"the package of style '{style}' has no {member}")
        return file.read()


def _open_package(folder: Path, package: Package) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    file = folder / f"{package.package.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    data = file.read_bytes()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != package.integrity:
        raise TaskError(f"{file} is not the pinned package", why=f"its integrity is {digest}")
    archive = tarfile.open(fileobj=io.BytesIO(gzip.decompress(data)))  # noqa: SIM115 - read until the end
    return archive, {member.name: member for member in archive.getmembers()}


def candidates(sources: Sources, task: str, label: str, short_names: list[str]) -> Iterator[str]:
    """A class's drawings in a fixed random order that takes its pictograms in turn."""
    generator = generator_for(SEED, "order", task, label)
    queues = [generator.permutation(sources.variants(name)).tolist() for name in generator.permutation(short_names)]
    for turn in zip_longest(*queues):
        yield from (name for name in turn if name is not None)


def choose(sources: Sources, task: str, label: str, short_names: list[str], count: int) -> list[str]:
    """The first ``count`` candidates that are visibly different from each other in every style."""
    chosen: list[str] = []
    looks: list[NDArray[np.float64]] = []
    for name in candidates(sources, task, label, short_names):
        look = np.stack([_look(sources.drawing(package.style, name)) for package in PACKAGES])
        if all(np.sqrt(((look - other) ** 2).mean(axis=1)).min() >= SAME_DRAWING_RMS for other in looks):
            chosen.append(name)
            looks.append(look)
        if len(chosen) == count:
            return chosen
    raise TaskError(f"class '{label}' of '{task}' has {len(chosen)} different drawings; {count} are needed")


def _look(drawing: Image.Image) -> NDArray[np.float64]:
    grey = Image.new("RGBA", drawing.size, (128, 128, 128, 255))
    grey.alpha_composite(drawing)
    return np.asarray(grey.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float64).ravel()


def deal(chosen: list[str], counts: dict[str, int], splits: tuple[SplitName, ...]) -> Iterator[tuple[SplitName, str]]:
    """Consecutive drawings to consecutive splits."""
    start = 0
    for split in splits:
        for name in chosen[start : start + counts[split]]:
            yield split, name
        start += counts[split]


def build_task(sources: Sources, name: str, spec: dict[str, dict[str, object]]) -> tuple[TaskRecipe, dict[str, bytes]]:
    """A task's recipe and its sheets."""
    counts = msgspec.convert(spec["counts"], dict[str, int])
    classes = msgspec.convert(spec["classes"], dict[str, list[str]])
    needed = max(sum(counts[split] for split in splits) for splits in (SERVER_SPLITS, DEVICE_SPLITS))
    styles: dict[str, list[Drawing]] = {package.style: [] for package in PACKAGES}
    for number, (label, short_names) in enumerate(sorted(classes.items())):
        chosen = choose(sources, name, label, short_names, needed)
        for style, drawings in styles.items():
            splits = DEVICE_SPLITS if style == DEVICE_STYLE else SERVER_SPLITS
            drawings += [Drawing(number, split, drawing) for split, drawing in deal(chosen, counts, splits)]
    sheets = {sheet_name(name, style): build_sheet(sources, style, drawings) for style, drawings in styles.items()}
    return TaskRecipe(name, sorted(classes), styles), sheets


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


def build(folder: Path, specs: dict[str, dict[str, dict[str, object]]]) -> bytes:
    """The pack's bytes, from a folder with the three packages."""
    sources = Sources(folder)
    entries: dict[str, bytes] = {}
    tasks = []
    for name, spec in specs.items():
        task, sheets = build_task(sources, name, spec)
        tasks.append(task)
        entries |= sheets
        print(f"{name:12s} {sum(map(len, task.styles.values())):5d} drawings {sum(map(len, sheets.values())):8d} bytes")
    refuse_shared(tasks)
    recipe = Recipe(FORMAT, CELL, COLUMNS, list(PACKAGES), tasks)
    data = write_archive({RECIPE: msgspec.json.encode(recipe), **entries})
    if len(data) > MAX_PACK_BYTES:
        raise TaskError(f"the pack has {len(data)} bytes; {MAX_PACK_BYTES} are allowed")
    return data


def download(folder: Path) -> None:
    """Fetch the pinned packages with npm."""
    for package in PACKAGES:
        command = ["npm", "pack", "--silent", f"{package.package}@{package.version}"]
        subprocess.run(command, cwd=folder, check=True, timeout=300)


def main() -> None:
    """Build the pack and write it with its digest."""
    parser = argparse.ArgumentParser(description="Build the shipped tasks' pack.")
    parser.add_argument("--packages", type=Path, help="folder with the three .tgz files; default: download them")
    parser.add_argument("--out", type=Path, default=ROOT / "server_tools" / "kiridashi_server" / "tasks" / "data")
    arguments = parser.parse_args()
    specs = tomllib.loads((Path(__file__).parent / "shipped_tasks.toml").read_text(encoding="utf-8"))["tasks"]
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.packages is None:
            download(Path(temporary))
        data = build(arguments.packages or Path(temporary), specs)
    digest = hashlib.sha256(data).hexdigest()
    write_atomic(arguments.out / PACK, data)
    write_atomic(arguments.out / PACK_DIGEST, f"{digest}  {PACK}\n".encode())
    print(f"{arguments.out / PACK}: {len(data)} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
