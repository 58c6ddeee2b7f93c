"""The bundle's drift reference: what the server's own samples look like, and what the float model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from kiridashi.artifacts import describe_file
from kiridashi.drift.rows import MAX_REFERENCE_ROWS, REFERENCE_NAME, Row, write_reference
from kiridashi.drift.statistics import NAMES, frame_statistics
from kiridashi.preprocess import softmax
from numpy.typing import NDArray

from kiridashi_server.export.bundle import BundleFile


def drift_reference(images: NDArray[np.uint8], logits: NDArray[np.float32], folder: Path) -> BundleFile:
    """Write the reference into ``folder``: of at most 256 images, spread evenly over those that are given.

    Args:
        images: samples that the model was not made on and that do not repeat each other, uint8 [n, H, W, 3].
        logits: the float model's, float32 [n, classes].
        folder: where the file goes.
    """
    count = min(len(images), MAX_REFERENCE_ROWS)
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int)
    values = softmax(logits)
    rows = []
    for n in chosen:
        numbers = frame_statistics(images[n], values[n], (images.shape[1], images.shape[2]))
        rows.append(Row(0.0, int(values[n].argmax()), tuple(numbers.tolist())))
    path = folder / REFERENCE_NAME
    write_reference(path, NAMES, rows)
    return BundleFile(path, describe_file(path, "drift-reference"))


def first_of_each(sources: Sequence[str]) -> tuple[int, ...]:
    """The places of the first sample of every source: views of one thing are not independent of each other."""
    return tuple(sorted({source: place for place, source in reversed(list(enumerate(sources)))}.values()))
