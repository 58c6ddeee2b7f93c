"""From camera frames to a model's input, in numpy.

Resizing is a separable triangle filter. It is widened by the scale when shrinking, so every source pixel counts and
fine texture does not alias: the filter that imaging libraries call bilinear, with pixel centres at half integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import InputError
from kiridashi.manifest import Preprocessing
from kiridashi.runtime.protocol import FloatArray, Layout


def as_frames(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One frame [H, W, 3] or a batch [N, H, W, 3], as a batch.

    Raises:
        InputError: not uint8, not RGB, or empty.
    """
    if not isinstance(frames, np.ndarray):
        raise _unusable(type(frames).__name__)
    batch = frames[None] if frames.ndim == 3 else frames
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3 or 0 in batch.shape:
        raise _unusable(f"{frames.dtype} {list(frames.shape)}")
    return batch


def model_input(
    frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], spec: Preprocessing, layout: Layout
) -> FloatArray:
    """:func:`to_input` of one frame, a batch, or a list of frames that may differ in size.

    Raises:
        InputError: not such frames, or an empty list.
    """
    if isinstance(frames, np.ndarray):
        return to_input(as_frames(frames), spec, layout)
    if not isinstance(frames, list | tuple) or not frames:
        raise _unusable("an empty list" if isinstance(frames, list | tuple) else type(frames).__name__)
    if not all(isinstance(frame, np.ndarray) and frame.ndim == 3 for frame in frames):
        raise _unusable("a list of other things than frames")
    return to_input(
        np.concatenate([resize(as_frames(frame), spec.height, spec.width) for frame in frames]), spec, layout
    )


def _unusable(what: str) -> InputError:
    return InputError(
        f"{what} cannot be used as a frame",
        why="frames are uint8 RGB, [height, width, 3] or [number, height, width, 3], or a list of such frames",
    )


def to_input(frames: NDArray[np.uint8], spec: Preprocessing, layout: Layout) -> FloatArray:
    """Resize where needed and normalise: ``(pixel / 255 - mean) / std`` per channel.

    Args:
        frames: uint8 [N, H, W, 3], as :func:`as_frames` returns.
        spec: size, mean and deviation of the manifest.
        layout: the order of axes that the model takes.

    Returns:
        float32, contiguous: [N, 3, height, width] or [N, height, width, 3].
    """
    sized = resize(frames, spec.height, spec.width)
    scale, shift = _affine(spec)
    if layout == "NHWC":
        rows: FloatArray = np.multiply(sized, scale)
        rows += shift
        return rows
    out = np.empty((len(sized), 3, spec.height, spec.width), np.float32)
    np.multiply(sized.transpose(0, 3, 1, 2), scale[:, None, None], out=out)
    out += shift[:, None, None]
    return out


def resize(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Frames [N, H, W, 3] at another size, uint8; the very same array when the size is right already."""
    if frames.shape[1:3] == (height, width):
        return frames
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, place in zip(frames, out, strict=True):
        rows = _filter_axis(frame, height)
        columns = _filter_axis(rows.transpose(1, 0, 2), width)
        place[:] = np.clip(np.rint(columns.transpose(1, 0, 2)), 0, 255)
    return out


def softmax(logits: FloatArray) -> FloatArray:
    """Probabilities along the last axis, float32."""
    # The ufuncs' own reductions: the methods of arrays go through Python first, which is most of the time here.
    values: FloatArray = logits - np.maximum.reduce(logits, axis=-1, keepdims=True)
    np.exp(values, out=values)
    values /= np.add.reduce(values, axis=-1, keepdims=True)
    return values


def _filter_axis(image: NDArray[np.uint8] | FloatArray, size: int) -> FloatArray:
    """Resample the first axis of [L, M, 3] to ``size``."""
    out = np.empty((size, *image.shape[1:]), np.float32)
    for n, (start, weights) in enumerate(_taps(image.shape[0], size)):
        piece = image[start : start + len(weights)].astype(np.float32, copy=False)
        out[n] = np.tensordot(weights, piece, 1)
    return out


@lru_cache(maxsize=8)
def _taps(old: int, new: int) -> tuple[tuple[int, FloatArray], ...]:
    """For every new pixel: the first old pixel under the triangle, and the normalised weights from there on."""
    scale = old / new
    reach = max(scale, 1.0)
    taps = []
    for n in range(new):
        centre = (n + 0.5) * scale
        start, stop = max(0, int(centre - reach + 0.5)), min(old, int(centre + reach + 0.5))
        distance = np.abs(np.arange(start, stop) + 0.5 - centre) / reach
        weights = np.maximum(0.0, 1.0 - distance)
        taps.append((start, (weights / weights.sum()).astype(np.float32)))
    return tuple(taps)


@lru_cache(maxsize=8)
def _affine(spec: Preprocessing) -> tuple[FloatArray, FloatArray]:
    """``scale`` and ``shift`` [3] with ``pixel · scale + shift = (pixel / 255 - mean) / std``."""
    mean, std = np.array(spec.mean, np.float64), np.array(spec.std, np.float64)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
