"""A task as a folder that people make by hand.

::

    press-3/
      scratch/   0001.png  0002.png …     a class folder: its name is the label
      good/      0001.png …
      train.txt  test.txt …               optional: which image is in which split
      sources.txt                         optional: "scratch/0001.png<TAB>part-17": what an image is a view of
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from kiridashi.artifacts import write_atomic
from PIL import Image

from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.images import DEFAULT_LIMITS, SUFFIXES, Limits, read_image
from kiridashi_server.tasks.packed import check_image_size, check_volume, encode_image
from kiridashi_server.tasks.splitting import check_listed, deal_splits, read_lines, read_splits
from kiridashi_server.tasks.task import Samples, Task, check_classes

SOURCES_FILE = "sources.txt"
_IGNORED = ("thumbs.db", "desktop.ini")


def load_task(path: Path | str, image_size: int = 64, seed: int = 0, limits: Limits = DEFAULT_LIMITS) -> Task:
    """Read a task from a folder of class folders.

    Classes are numbered by name. Without split files the images of each class are dealt to ``train``, ``val``,
    ``tune``, ``holdout`` and ``test`` (40, 10, 20, 10 and 20 %, at least one each), which depends on the seed and
    the file names only. Images that share a source in ``sources.txt`` stay together; an image that is not listed
    there is its own source.

    Args:
        path: the folder.
        image_size: side of the square images, in pixels.
        seed: for dealing the splits when there are no split files.
        limits: what input may cost at most.

    Raises:
        TaskError: the folder, an image or a list cannot be used; the message names the file and the line.
    """
    folder = Path(path)
    check_image_size(image_size)
    by_class = _scan(folder, limits)
    name = folder.resolve().name
    check_classes(name, tuple(by_class))
    known = {f"{label}/{file}" for label, files in by_class.items() for file in files}
    source_of = _read_sources(folder, known)
    splits = read_splits(folder, known) or deal_splits(source_of, seed)
    check_volume(sum(map(len, splits.values())), image_size, image_size, limits)
    number = {label: index for index, label in enumerate(by_class)}
    loaded = {}
    for split, paths in splits.items():
        images = np.zeros((len(paths), image_size, image_size, 3), dtype=np.uint8)
        for index, relative in enumerate(paths):
            images[index] = read_image(folder / relative, image_size, limits)
        labels = np.asarray([number[relative.split("/")[0]] for relative in paths], dtype=np.int64)
        loaded[split] = Samples(images, labels, tuple(source_of[relative] for relative in paths))
    return Task(name, tuple(by_class), loaded)


def save_task_folder(task: Task, path: Path | str) -> None:
    """Write a task as a folder that :func:`load_task` reads back with the same digest.

    Images are written as lossless PNG; the folder's name should be the task's, as it is read from there.

    Raises:
        TaskError: the folder exists and is not empty, or a label cannot be a folder's name.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TaskError(f"{folder} exists and is not an empty folder", next_step="choose another folder")
    for label in task.labels:
        if not label or label.startswith(".") or "/" in label or "\\" in label or "\0" in label:
            raise TaskError(f"the label '{label}' cannot be the name of a class folder")
    sources = []
    for name, samples in task.splits.items():
        listed = []
        for index in range(len(samples)):
            label = task.labels[int(samples.labels[index])]
            relative = f"{label}/{name}-{index:05d}.png"
            write_atomic(folder / relative, encode_image(Image.fromarray(samples.images[index]), "PNG"))
            listed.append(relative)
            sources.append(f"{relative}\t{samples.sources[index]}")
        write_atomic(folder / f"{name}.txt", "".join(f"{line}\n" for line in listed).encode())
    write_atomic(folder / SOURCES_FILE, "".join(f"{line}\n" for line in sources).encode())


def _scan(folder: Path, limits: Limits) -> dict[str, list[str]]:
    """File names by class, both sorted; refuses links, stray files and more than the limits allow."""
    if not folder.is_dir():
        raise TaskError(f"{folder} is not a folder", next_step="give a folder of class folders with images")
    by_class: dict[str, list[str]] = {}
    left = limits.max_files
    for entry in _entries(folder):
        if entry.is_symlink():
            raise _link(entry)
        if not entry.is_dir():
            continue
        files = []
        for file in _entries(Path(entry.path)):
            _check_file(file)
            files.append(file.name)
            left -= 1
            if left < 0:
                raise TaskError(f"{folder} has more than {limits.max_files} images", why="that is the limit")
        if not files:
            raise TaskError(
                f"class '{entry.name}' is empty", why=f"{entry.path} has no image", next_step="add images, or remove it"
            )
        by_class[entry.name] = sorted(files)
        if len(by_class) > limits.max_classes:
            raise TaskError(f"{folder} has more than {limits.max_classes} classes", why="that is the limit")
    return {label: by_class[label] for label in sorted(by_class)}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in _IGNORED]


def _check_file(file: os.DirEntry[str]) -> None:
    if file.is_symlink():
        raise _link(file)
    if not file.is_file() or not file.name.lower().endswith(SUFFIXES):
        raise TaskError(
            f"{file.path} is not an image",
            why=f"a class folder holds only files that end with {', '.join(SUFFIXES)}",
            next_step="move it out of the class folder, or convert it",
        )


def _link(entry: os.DirEntry[str]) -> TaskError:
    return TaskError(
        f"{entry.path} is a symbolic link",
        why="a task holds its own files; links could lead anywhere",
        next_step="copy the file in place of the link",
    )


def _read_sources(folder: Path, known: set[str]) -> Mapping[str, str]:
    """Source of every known image: from ``sources.txt`` where listed there, else the image itself."""
    source_of = {path: path for path in known}
    file = folder / SOURCES_FILE
    if not file.exists():
        return source_of
    for number, line in read_lines(file):
        path, tab, source = line.partition("\t")
        if not tab or not source:
            raise TaskError(f"{file}, line {number}: expected an image's path, a tab and a source's name")
        source_of[check_listed(path, known, f"{file}, line {number}")] = source
    return source_of
