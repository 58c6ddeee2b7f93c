"""Which images go into which split: read from split files, or dealt from a seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.task import SPLITS, SplitName

SHARES: Mapping[SplitName, float] = {"train": 0.4, "val": 0.1, "tune": 0.2, "holdout": 0.1, "test": 0.2}
"""Share of a class's sources that each split gets when there are no split files; at least one in each."""

_MAX_LIST_BYTES = 16 * 2**20


def read_splits(folder: Path, known: Collection[str]) -> dict[SplitName, list[str]]:
    """Read ``train.txt`` and its siblings: one path a line, relative to ``folder``, with forward slashes.

    Empty lines and lines that begin with ``#`` are passed over. Images in no list are not used.

    Raises:
        TaskError: a path leads out of the folder, is not among ``known``, or stands in two splits or twice in one.
    """
    splits: dict[SplitName, list[str]] = {}
    owner: dict[str, str] = {}
    for name in SPLITS:
        file = folder / f"{name}.txt"
        if not file.exists():
            continue
        splits[name] = []
        for number, line in read_lines(file):
            path = check_listed(line, known, f"{file}, line {number}")
            if path in owner:
                raise TaskError(
                    f"{file}, line {number}: '{path}' is already in {owner[path]}.txt",
                    why="an image belongs to one split only",
                    next_step="remove one of the two lines",
                )
            owner[path] = name
            splits[name].append(path)
    return splits


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines of a UTF-8 list file, without empty lines and ``#`` comments.

    Raises:
        TaskError: the file is a symbolic link, too large, or not UTF-8 text.
    """
    if file.is_symlink() or not file.is_file():
        raise TaskError(f"{file} is not a plain file", why="links and folders are not followed")
    if file.stat().st_size > _MAX_LIST_BYTES:
        raise TaskError(f"{file} is larger than {_MAX_LIST_BYTES // 2**20} MiB")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not UTF-8 text", why=str(error), next_step="save it as UTF-8") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def check_listed(path: str, known: Collection[str], where: str) -> str:
    """Return the path if it is one of the images found in the task's folder.

    Raises:
        TaskError: it is absolute, leads upwards, or names no such image.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise TaskError(
            f"{where}: '{path}' leads out of the task's folder",
            why="paths are relative to it, with forward slashes and without '..'",
        )
    if path not in known:
        raise TaskError(
            f"{where}: there is no image '{path}'",
            next_step="correct the line, or add the file to its class folder",
        )
    return path


def deal_splits(source_of: Mapping[str, str], seed: int) -> dict[SplitName, list[str]]:
    """Deal images to all five splits by :data:`SHARES`, class by class, keeping a source's images together.

    Args:
        source_of: image path (``class/file``) to source name.
        seed: decides the deal, together with the class's name.

    Raises:
        TaskError: a class has fewer than five sources.
    """
    by_class: dict[str, dict[str, list[str]]] = {}
    for path in sorted(source_of):
        by_class.setdefault(path.split("/")[0], {}).setdefault(source_of[path], []).append(path)
    splits: dict[SplitName, list[str]] = {name: [] for name in SPLITS}
    for label, by_source in by_class.items():
        if len(by_source) < len(SPLITS):
            raise TaskError(
                f"class '{label}' has {len(by_source)} images of different things",
                why=f"dealing them to {len(SPLITS)} splits needs at least as many",
                next_step="add images, or write split files such as train.txt and test.txt",
            )
        order = generator_for(seed, "split", label).permutation(sorted(by_source)).tolist()
        for name, count in _counts(len(order)).items():
            for source in order[:count]:
                splits[name] += by_source[source]
            order = order[count:]
    return splits


def _counts(total: int) -> dict[SplitName, int]:
    """Whole numbers that sum to ``total``, one at least for each split, as near to the shares as can be."""
    counts: dict[SplitName, int] = dict.fromkeys(SPLITS, 1)
    for _ in range(total - len(SPLITS)):
        neediest = max(SPLITS, key=lambda name: SHARES[name] * total - counts[name])
        counts[neediest] += 1
    return counts
