"""Reading one image file that may be anything: wrong, huge, odd in colour, or hostile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kiridashi_server.tasks.errors import TaskError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class Limits:
    """What input may cost at most. The defaults hold 20,000 frames of a 48-megapixel camera.

    ``max_task_bytes`` limits all images of a task together, at the size they are loaded at.
    """

    max_files: int = 20_000
    max_classes: int = 1_000
    max_file_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_task_bytes: int = 2 * 2**30


DEFAULT_LIMITS = Limits()


def read_image(path: Path, size: int, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Read a PNG, JPEG, WebP or BMP file as uint8 [size, size, 3], RGB.

    The whole frame is resized to a square, as the device does it before predicting; cropping could lose a defect
    at the edge. Transparency is composited on white, grey becomes RGB, 16-bit grey keeps its upper 8 bits, and
    the EXIF orientation is applied. Pixels are counted from the header, before anything is decoded.

    Raises:
        TaskError: the file cannot be read as such an image, or is over the limits.
    """
    try:
        if path.stat().st_size > limits.max_file_bytes:
            raise _refusal(path, f"the file is larger than {limits.max_file_bytes // 2**20} MiB")
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                raise _refusal(path, f"it has {image.width} x {image.height} pixels; {limits.max_pixels} allowed")
            upright = ImageOps.exif_transpose(image)
            frame = to_rgb(upright).resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _refusal(path, str(error)) from error
    return np.asarray(frame, dtype=np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB: alpha composited on white, 16-bit grey reduced to 8 bits."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, _WHITE)
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _refusal(path: Path, why: str) -> TaskError:
    return TaskError(
        f"the image {path} cannot be used",
        why=why,
        next_step="remove the file, or save it again as PNG or JPEG",
    )
