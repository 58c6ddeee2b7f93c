"""Writing tuned parameters into a model file, at the places that the manifest lists. No model library is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from kiridashi.artifacts import write_atomic
from kiridashi.errors import BundleError
from kiridashi.manifest import Patch
from kiridashi.runtime.protocol import FloatArray


def read_parameters(path: Path, patches: Sequence[Patch]) -> dict[str, FloatArray]:
    """The parameters that a model file holds, each float32 in its own shape.

    Raises:
        BundleError: a place lies outside the file.
    """
    data = path.read_bytes()
    return {patch.parameter: _read(data, patch, path) for patch in patches}


def patch_artifact(source: Path, patches: Sequence[Patch], values: Mapping[str, FloatArray], destination: Path) -> None:
    """Write a copy of a model file with other parameters; atomic and synced.

    Args:
        source: the shipped file.
        patches: the places to write, each float32 little-endian.
        values: for every patch's parameter as many values as it has, in its shape or flat.
        destination: the file to write.

    Raises:
        BundleError: a place lies outside the file, a parameter is missing, has another size, or is not finite.
    """
    write_atomic(destination, patched(source, patches, values))


def patched(source: Path, patches: Sequence[Patch], values: Mapping[str, FloatArray]) -> bytes:
    """The bytes of a model file with other parameters; arguments and errors as :func:`patch_artifact`."""
    data = bytearray(source.read_bytes())
    for patch in patches:
        old = _read(data, patch, source)
        new = values.get(patch.parameter)
        if new is None or new.size != old.size or not np.isfinite(new).all():
            raise BundleError(f"no usable values for '{patch.parameter}' of {source.name}")
        piece = np.ascontiguousarray(new.reshape(patch.shape).transpose(patch.order), dtype="<f4").tobytes()
        data[patch.offset : patch.offset + len(piece)] = piece
    return bytes(data)


def _read(data: bytes | bytearray, patch: Patch, path: Path) -> FloatArray:
    count = math.prod(patch.shape)
    if patch.offset + 4 * count > len(data) or len(patch.order) != len(patch.shape):
        raise BundleError(f"the place of '{patch.parameter}' in {path} lies outside the file or has no transpose")
    flat = np.frombuffer(data, "<f4", count, patch.offset)
    stored = flat.reshape([patch.shape[axis] for axis in patch.order])
    return np.ascontiguousarray(stored.transpose(np.argsort(patch.order)), np.float32)
