"""Stacked scores in files: one file a set of records, named by the set and by its own bytes.

A file is ``<set>-<sha256>.npy``, the array of a :class:`ScoreStack`. The set's digest goes over
ids and digests of the stored scores, so a stack of other records, or of other scores, is never found.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from kiridashi.artifacts import sha256_file, sync_folder

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.compose.calibration import on_one_scale
from kiridashi_server.compose.stack import SUMMARY_ROWS, Matrix, ScoreStack, Vote, flatten, split, summarise

STACK_FROM = 64
"""Records from which a stack is worth its file."""

_FORMAT = "kiridashi-stack-1"
Read = Callable[[str], ScoreMap]


class StackCache:
    """Stacks in ``folder``. Everything in it can be made again; the bank's lock keeps two processes from doing so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, votes: Sequence[Vote], read: Read) -> ScoreStack | None:
        """The stack of these votes, if there is one; a file of another shape is removed.

        Args:
            votes: by record id, ascending; at least one.
            read: the scores with a digest, checked.
        """
        sizes = _sizes(votes, read)
        for path in self._folder.glob(f"{_key(votes)}-*.npy"):
            matrix = _open(path, _shape(votes, sizes))
            if matrix is not None:
                return _stack(votes, sizes, matrix)
            path.unlink()
        return None

    def make(self, votes: Sequence[Vote], read: Read) -> ScoreStack:
        """Stack these votes; arguments as those of :meth:`find`.

        Raises:
            InputError: they do not have the same groups.
        """
        sizes = _sizes(votes, read)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._write(votes, sizes, read)
        return _stack(votes, sizes, np.load(path, mmap_mode="r", allow_pickle=False))

    def clear(self, sets: Sequence[Sequence[Vote]], *, check: bool = False) -> int:
        """Remove all files but the stacks of these sets, and with ``check`` also those whose bytes have changed."""
        kept = {_key(votes) for votes in sets}
        removed = 0
        for path in sorted(self._folder.glob("*")):
            key, _, digest = path.stem.partition("-")
            if key not in kept or (check and sha256_file(path) != digest):
                path.unlink()
                removed += 1
        if removed:
            sync_folder(self._folder)
        return removed

    def _write(self, votes: Sequence[Vote], sizes: dict[str, int], read: Read) -> Path:
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=".stack.", suffix=".npy")
        os.close(handle)
        draft = Path(temporary)
        try:
            matrix: Matrix = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float32, shape=_shape(votes, sizes))
            for row, vote in enumerate(votes):
                matrix[row] = flatten(read(vote.sha256), sizes, vote.record_id)
            _calibrate(matrix, votes, sizes)
            summarise(matrix, sizes)
            matrix.flush()  # type: ignore[attr-defined]
            del matrix
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            path = self._folder / f"{_key(votes)}-{sha256_file(draft)}.npy"
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(self._folder)
        return path


def _calibrate(matrix: Matrix, votes: Sequence[Vote], sizes: dict[str, int]) -> None:
    """Put the rows that are not learnt on the scale of those that are."""
    learnt = np.array([vote.learnt for vote in votes])
    if learnt.all():
        return
    guides = [split(matrix[:-SUMMARY_ROWS][learnt].mean(axis=0), sizes)] if learnt.any() else []
    for row in np.flatnonzero(~learnt):
        scores = split(matrix[row], sizes)
        *_, vote = on_one_scale([*guides, scores], [True] * len(guides) + [False])
        matrix[row] = np.concatenate([vote[name] for name in sizes])


def _sizes(votes: Sequence[Vote], read: Read) -> dict[str, int]:
    return {name: len(values) for name, values in sorted(read(votes[0].sha256).items())}


def _shape(votes: Sequence[Vote], sizes: dict[str, int]) -> tuple[int, int]:
    return len(votes) + SUMMARY_ROWS, sum(sizes.values())


def _stack(votes: Sequence[Vote], sizes: dict[str, int], matrix: Matrix) -> ScoreStack:
    return ScoreStack(tuple(vote.record_id for vote in votes), sizes, matrix)


def _open(path: Path, shape: tuple[int, int]) -> Matrix | None:
    """The file's array, or None if it is not one of this shape; its bytes are checked by ``bank verify``."""
    try:
        matrix: Matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return matrix if matrix.shape == shape and matrix.dtype == np.float32 else None


def _key(votes: Sequence[Vote]) -> str:
    content = [_FORMAT, [[vote.record_id, vote.sha256, vote.learnt] for vote in votes]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
