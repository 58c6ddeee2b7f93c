"""Local samples: labelled frames, in ``.npz`` files or named in the spool, that stay on the device.

A ``.npz`` file holds ``images`` uint8 [N, H, W, 3], ``labels`` [N] (class names, or indices into the manifest's
labels) and, if the user wants to choose the hold-out, ``holdout`` bool [N]. Files are read without pickle, and their
unpacked size is checked before they are unpacked.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError
from kiridashi.preprocess import as_frames, resize
from kiridashi.spool import AnswerLog, SpoolFolder

MAX_FILES = 256
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
HOLDOUT_SHARE = 0.25


@dataclass(frozen=True)
class Samples:
    """Labelled frames: ``images`` uint8 [N, H, W, 3], ``labels`` int64 [N], ``holdout`` bool [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    holdout: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, *, holdout: bool) -> Samples:
        """Only the hold-out, or only the samples to learn from."""
        chosen = self.holdout == holdout
        return Samples(self.images[chosen], self.labels[chosen], self.holdout[chosen])


def write_samples(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | Sequence[str],
    holdout: NDArray[np.bool_] | None = None,
) -> None:
    """Write one sample file atomically.

    Raises:
        InputError: the arrays do not fit each other.
    """
    names = np.asarray(labels)
    arrays: dict[str, NDArray[np.generic]] = {"images": images, "labels": names}
    if holdout is not None:
        arrays["holdout"] = holdout
    _check_arrays(arrays, str(path))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def load_samples(
    folder: Path | None, labels: Sequence[str], height: int, width: int, spool: SpoolFolder | None = None
) -> Samples:
    """Read every ``.npz`` file of a folder, in the order of their names, and the frames that people named.

    Frames of another size are resized. Of identical frames one is kept, a hold-out copy before others, so that no
    frame is both learnt from and judged by. Where no file says which samples are the hold-out, a quarter of every
    class is held out (at least one, if the class has two): those whose content hashes come first, so adding files
    does not depend on names or order. Of the named frames a quarter is held out in any case, in the same way; a frame
    that is in a file too counts as the file says.

    Args:
        folder: the folder; ``None`` leaves only the spool.
        labels: the class names, in the model's order.
        height: rows of the frames returned.
        width: columns of the frames returned.
        spool: where people named frames; see :func:`labelled_samples`.

    Raises:
        InputError: nothing to read from, too many or too large files, an unreadable one, an unknown class, or one frame
            under two classes.
        StateError: the answers of the spool cannot be read.
    """
    named = labelled_samples(spool, labels, height, width) if spool is not None else None
    if folder is None:
        if named is None:
            raise InputError("there are neither sample files nor a spool to read")
        return named
    if named is not None and len(named) and not any(folder.glob("*.npz")):
        return named
    filed = _load_folder(folder, labels, height, width)
    return filed if named is None else _joined(filed, named)


def labelled_samples(spool: SpoolFolder, labels: Sequence[str], height: int, width: int) -> Samples:
    """The frames of a spool that people gave a class which the model knows; none, if there are none.

    Frames of another size are resized, and a quarter of every class is held out as by :func:`load_samples`. Of frames
    with the same pixels the last answer counts. Damaged ones are set aside.

    Raises:
        StateError: the answers cannot be read.
    """
    named: dict[str, tuple[NDArray[np.uint8], int]] = {}
    for answer in AnswerLog(spool.answers_path).answers():
        frame = spool.read(spool.answered / answer.entry) if answer.label in labels else None
        if frame is not None:
            image = np.frombuffer(frame.pixels, np.uint8).reshape(1, frame.header.height, frame.header.width, 3)
            sized = resize(image, height, width)[0]
            named[_key(sized)] = sized, labels.index(answer.label)
    if not named:
        return Samples(np.empty((0, height, width, 3), np.uint8), np.empty(0, np.int64), np.empty(0, np.bool_))
    classes = np.array([label for _, label in named.values()], np.int64)
    return Samples(
        np.stack([image for image, _ in named.values()]),
        classes,
        _hold_out(list(named), classes, np.arange(len(named))),
    )


def _load_folder(folder: Path, labels: Sequence[str], height: int, width: int) -> Samples:
    parts = list(_read_folder(folder, labels, height, width))
    images = np.concatenate([part.images for part in parts])
    classes = np.concatenate([part.labels for part in parts])
    flagged = np.concatenate([part.holdout for part in parts])
    keys = [_key(image) for image in images]
    kept = _without_copies(keys, classes, flagged, labels, folder)
    holdout = flagged if flagged.any() else _hold_out(keys, classes, kept)
    return Samples(images[kept], classes[kept], holdout[kept])


def _joined(filed: Samples, named: Samples) -> Samples:
    known = {_key(image) for image in filed.images}
    new = np.array([_key(image) not in known for image in named.images], np.bool_)
    return Samples(
        np.concatenate([filed.images, named.images[new]]),
        np.concatenate([filed.labels, named.labels[new]]),
        np.concatenate([filed.holdout, named.holdout[new]]),
    )


def _key(image: NDArray[np.uint8]) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _read_folder(folder: Path, labels: Sequence[str], height: int, width: int) -> Iterator[Samples]:
    paths = sorted(folder.glob("*.npz")) if folder.is_dir() else []
    if not paths:
        raise InputError(
            f"{folder} holds no samples",
            why="no .npz file is there",
            next_step="write samples with kiridashi.samples.write_samples",
        )
    if len(paths) > MAX_FILES:
        raise InputError(f"{folder} holds {len(paths)} sample files", why=f"the limit is {MAX_FILES}")
    left = MAX_UNPACKED_BYTES
    for path in paths:
        arrays, size = _read_file(path, left)
        left -= size
        images = resize(as_frames(arrays["images"].astype(np.uint8, copy=False)), height, width)
        classes = _class_indices(arrays["labels"], labels, path)
        flags = arrays.get("holdout", np.zeros(len(images), np.bool_))
        yield Samples(images, classes, flags.astype(np.bool_))


def _read_file(path: Path, limit_bytes: int) -> tuple[dict[str, NDArray[np.generic]], int]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > limit_bytes:
            raise InputError(
                f"the samples up to {path} are over {MAX_UNPACKED_BYTES} bytes unpacked",
                next_step="keep fewer samples, or store them at the model's size",
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels", "holdout") if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"the sample file {path} cannot be read", why=str(error)) from error
    _check_arrays(arrays, str(path))
    return arrays, size


def _check_arrays(arrays: dict[str, NDArray[np.generic]], source: str) -> None:
    for name in ("images", "labels"):
        if name not in arrays:
            raise InputError(f"the sample file {source} has no array '{name}'")
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        shape = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"the images of {source} are {shape}", why="they must be uint8 [N, H, W, 3]")
    for name in set(arrays) - {"images"}:
        if arrays[name].shape != (len(images),):
            raise InputError(f"'{name}' of {source} does not have one entry for each of {len(images)} images")
    if "holdout" in arrays and arrays["holdout"].dtype != np.bool_:
        raise InputError(f"'holdout' of {source} is {arrays['holdout'].dtype}, not bool")


def _class_indices(values: NDArray[np.generic], labels: Sequence[str], path: Path) -> NDArray[np.int64]:
    if values.dtype.kind in "iu":
        indices = values.astype(np.int64)
        if indices.min() < 0 or indices.max() >= len(labels):
            raise InputError(f"{path} has a class index outside 0 … {len(labels) - 1}")
        return indices
    index = {name: n for n, name in enumerate(labels)}
    unknown = sorted({str(value) for value in values} - set(index))
    if unknown:
        raise InputError(f"{path} has the unknown class '{unknown[0]}'", why=f"the model knows {', '.join(labels)}")
    return np.array([index[str(value)] for value in values], np.int64)


def _without_copies(
    keys: Sequence[str],
    classes: NDArray[np.int64],
    flagged: NDArray[np.bool_],
    labels: Sequence[str],
    folder: Path,
) -> NDArray[np.int64]:
    """The positions to keep, ascending."""
    chosen: dict[str, int] = {}
    for n in sorted(range(len(keys)), key=lambda n: not flagged[n]):
        first = chosen.setdefault(keys[n], n)
        if classes[first] != classes[n]:
            pair = f"'{labels[classes[first]]}' and '{labels[classes[n]]}'"
            raise InputError(f"one frame in {folder} is labelled both {pair}", next_step="remove one of them")
    return np.array(sorted(chosen.values()), np.int64)


def _hold_out(keys: Sequence[str], classes: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.bool_]:
    holdout = np.zeros(len(keys), np.bool_)
    for label in np.unique(classes[kept]):
        members = sorted((int(n) for n in kept[classes[kept] == label]), key=lambda n: keys[n])
        if len(members) > 1:
            holdout[members[: max(1, round(HOLDOUT_SHARE * len(members)))]] = True
    return holdout
