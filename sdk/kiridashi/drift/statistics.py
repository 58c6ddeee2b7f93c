"""What is noted of a frame: numbers of the image at the model's own size, and of the model's output.

Luma is that of ITU-R BT.601. ``sharpness`` is how much slopes bend (Laplacian) over how steep they are: a blur leaves
the sum of an edge's steps as it is and takes its bends away. ``grain`` is the noise operator of Immerkær 1996 ("Fast
noise variance estimation"), which is blind to edges and slopes. Only the order of values is used later, so logarithms
are for people.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import InputError
from kiridashi.preprocess import as_frames, resize

GRID = 3
IMAGE_NAMES: tuple[str, ...] = (
    *("brightness", "red", "blue", "colour", "contrast", "texture", "sharpness", "grain", "clipped"),
    *(f"light-{row}-{column}" for row in range(GRID) for column in range(GRID)),
)
OUTPUT_NAMES: tuple[str, ...] = ("confidence", "entropy")
NAMES: tuple[str, ...] = (*IMAGE_NAMES, *OUTPUT_NAMES)
MIN_SIDE = 8
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_UNIT = np.float32(1 / 255)
_TINY = 1e-4
Float64 = NDArray[np.float64]


def frame_statistics(frame: NDArray[np.uint8], values: NDArray[np.float32], size: tuple[int, int]) -> Float64:
    """The statistics of one frame, float64 [len(NAMES)].

    Args:
        frame: uint8 RGB [H, W, 3].
        values: probabilities [classes].
        size: height and width of the model's input, to which the frame is resized as for the model.

    Raises:
        InputError: not such a frame, a side of ``size`` is below 8, or values that are not finite.
    """
    if min(size) < MIN_SIDE or frame.ndim != 3:
        raise InputError(f"a frame {list(frame.shape)} at size {list(size)} has no statistics")
    sized = resize(as_frames(frame), *size)[0]
    numbers = np.concatenate([image_statistics(sized), output_statistics(values)])
    if not np.isfinite(numbers).all():
        raise InputError("the model's values are not finite")
    return numbers


def image_statistics(frame: NDArray[np.uint8]) -> Float64:
    """The numbers of :data:`IMAGE_NAMES` of a frame of the model's size, uint8 [H, W, 3]."""
    planes = [np.multiply(frame[:, :, channel], _UNIT, dtype=np.float32) for channel in range(3)]
    luma = _LUMA[0] * planes[0] + _LUMA[1] * planes[1] + _LUMA[2] * planes[2]
    red, green, blue = (float(plane.mean()) for plane in planes)
    brightness = float(luma.mean())
    slope = float(np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()) + _TINY
    middle = luma[1:-1, 1:-1]
    bend = np.abs(4 * middle - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]).mean()
    curve = luma[:, 2:] - 2 * luma[:, 1:-1] + luma[:, :-2]
    grain = float(np.abs(curve[2:] - 2 * curve[1:-1] + curve[:-2]).mean())
    cells = [
        float(cell.mean()) - brightness
        for row in np.array_split(luma, GRID, axis=0)
        for cell in np.array_split(row, GRID, axis=1)
    ]
    unit = brightness + _TINY
    return np.array(
        [
            brightness,
            (red - green) / unit,
            (blue - green) / unit,
            float((np.maximum.reduce(planes) - np.minimum.reduce(planes)).mean()),
            float(luma.std()),
            np.log(slope),
            np.log((float(bend) + _TINY) / slope),
            np.log(grain + _TINY),
            float(((luma < 0.02) | (luma > 0.98)).mean()),
            *cells,
        ]
    )


def output_statistics(values: NDArray[np.float32]) -> Float64:
    """Probability of the best class, and entropy as a share of its largest value; ``values`` [classes]."""
    p = values.astype(np.float64)
    if p.size == 1:
        p = np.array([p[0], 1.0 - p[0]])
    positive = p[p > 0]
    return np.array([float(p.max()), float(-(positive * np.log(positive)).sum() / np.log(p.size))])
