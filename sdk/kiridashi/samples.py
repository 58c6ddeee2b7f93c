"""Local samples: labelled frames, in ``.npz`` files or as pictures, that stay on the device.

A ``.npz`` file holds ``images`` uint8 [N, H, W, 3], ``labels`` [N] (class names, or indices into the manifest's
labels) and, if the user wants to choose the hold-out, ``holdout`` bool [N]. Files are read without pickle, and their
unpacked size is checked before they are unpacked.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError
from kiridashi.pictures import read_picture
from kiridashi.preprocess import as_frames

MAX_FILES = 256
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
_DAMAGE = (OSError, ValueError, EOFError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error)


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
        return self.where(self.holdout == holdout)

    def where(self, chosen: NDArray[np.bool_]) -> Samples:
        """Only the samples that are chosen, bool [N]."""
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


@dataclass(frozen=True)
class Packed:
    """Labelled frames of one file: ``images`` uint8 [N, H, W, 3] in their own size, ``labels`` int64 [N].

    ``holdout`` bool [N] is what the file says of them, ``None`` if it does not.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    holdout: NDArray[np.bool_] | None


def read_samples(place: Path, labels: Sequence[str]) -> Iterator[Packed]:
    """Read a ``.npz`` file, a folder of such files, or a folder with one sub-folder of pictures for each class.

    Files are read in the order of their names. What pictures can be is said in :mod:`kiridashi.pictures`.

    Args:
        place: the file or folder.
        labels: the class names, in the model's order.

    Raises:
        InputError: nothing to read there, too many or too large files, an unreadable one, or an unknown class.
    """
    packed = [place] if place.is_file() else sorted(place.glob("*.npz")) if place.is_dir() else []
    if packed:
        yield from _read_packed(packed, labels, place)
        return
    folders = sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    if not folders:
        raise InputError(
            f"{place} holds no samples",
            why="neither a .npz file nor a sub-folder of pictures is there",
            next_step="write samples with kiridashi.samples.write_samples, or make one sub-folder for each class",
        )
    yield from _read_pictures(folders, labels)


def _read_packed(paths: Sequence[Path], labels: Sequence[str], place: Path) -> Iterator[Packed]:
    if len(paths) > MAX_FILES:
        raise InputError(f"{place} holds {len(paths)} sample files", why=f"the limit is {MAX_FILES}")
    left = MAX_UNPACKED_BYTES
    for path in paths:
        arrays, size = _read_file(path, left)
        left -= size
        images = as_frames(arrays["images"].astype(np.uint8, copy=False))
        flags = arrays.get("holdout")
        yield Packed(
            images, _class_indices(arrays["labels"], labels, path), None if flags is None else flags.astype(np.bool_)
        )


def _read_pictures(folders: Sequence[Path], labels: Sequence[str]) -> Iterator[Packed]:
    left = MAX_UNPACKED_BYTES
    for folder in folders:
        if folder.name not in labels:
            raise _unknown_class(folder, folder.name, labels)
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        for path in paths:
            image = read_picture(path)
            left -= image.nbytes
            if left < 0:
                raise _too_large(path)
            yield Packed(image[None], np.array([labels.index(folder.name)], np.int64), None)


def _read_file(path: Path, limit_bytes: int) -> tuple[dict[str, NDArray[np.generic]], int]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > limit_bytes:
            raise _too_large(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels", "holdout") if name in file.files}
    except _DAMAGE as error:
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
        raise _unknown_class(path, unknown[0], labels)
    return np.array([index[str(value)] for value in values], np.int64)


def _unknown_class(path: Path, name: str, labels: Sequence[str]) -> InputError:
    return InputError(f"{path} has the unknown class '{name}'", why=f"the model knows {', '.join(labels)}")


def _too_large(path: Path) -> InputError:
    return InputError(
        f"the samples up to {path} are over {MAX_UNPACKED_BYTES} bytes unpacked",
        next_step="keep fewer samples, or store them at the model's size",
    )
