"""A device's state folder with an active model and a filled spool, for the page on which people name frames."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.manifest import Manifest
from kiridashi.slots import Active, LineSlots
from kiridashi.spool import Frame, FrameHeader, SpoolFolder
from kiridashi.spool.entries import Kind, encode_frame, new_name
from numpy.typing import NDArray
from tiny_bundle import LABELS, device_tiles, make_bundle

LINE = "press-3"


def activate(state: Path, labels: Sequence[str] = LABELS) -> Manifest:
    """Make the tiny bundle the active model of the line, under other class names if wanted."""
    slots = LineSlots(state, LINE)
    folder = slots.prepare("a")
    manifest = msgspec.structs.replace(make_bundle(folder), labels=tuple(labels))
    (folder / MANIFEST_NAME).write_bytes(manifest.encode())
    slots.activate(Active("a", "model.onnx", manifest.digest))
    return manifest


def add_frame(
    folder: SpoolFolder,
    values: Sequence[float],
    labels: Sequence[str] = LABELS,
    *,
    rank: float = 0.0,
    kind: Kind = "uncertain",
    image: NDArray[np.uint8] | None = None,
    digest: str = "sha256:model",
) -> str:
    """Put one frame into the spool as a line's process would; its file name."""
    folder.prepare()
    pixels = np.zeros((4, 6, 3), np.uint8) if image is None else image
    data = pixels.tobytes()
    height, width = pixels.shape[:2]
    header = FrameHeader(
        line=folder.line,
        digest=digest,
        time_s=time.time(),
        height=height,
        width=width,
        values=tuple(values),
        labels=tuple(labels),
        crc=zlib.crc32(data),
    )
    name = new_name(kind, rank, 1.0)
    folder.add(name, encode_frame(Frame(header, data)))
    return name


def fill(state: Path, per_class: int = 5, labels: Sequence[str] = LABELS) -> SpoolFolder:
    """Device tiles with unsure values, the true class among the first three."""
    folder = SpoolFolder(state, LINE)
    images, classes = device_tiles(per_class, seed=3)
    rng = np.random.default_rng(3)
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        values = rng.dirichlet(np.full(len(labels), 0.4))
        values[label] += 0.5
        values = values / values.sum()
        kind: Kind = "random" if number % 4 == 0 else "uncertain"
        add_frame(folder, [float(v) for v in values], labels, rank=float(values[0]), kind=kind, image=image)
    return folder
