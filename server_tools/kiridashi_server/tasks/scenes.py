"""One sample from one drawing: a seeded view of it on a seeded background, as a camera over a line might see it.

Everything is drawn with sums, products and Pillow's resampling; no transcendental function touches an array, so the
same versions of NumPy and Pillow give the same bytes on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

_SHADOW = 0.35
"""How much of the background's light an object's shadow takes away."""


def render(drawing: Image.Image, size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Composite a drawing (RGBA, square) on a background: uint8 [size, size, 3].

    The view varies in scale (0.62 to 0.92 of the frame), place, rotation (up to 14 degrees), light (gradient,
    gain, colour cast), sharpness and sensor noise.
    """
    scene = background(size, generator)
    placed = _place(drawing, size, generator)
    colour = np.asarray(placed, dtype=np.float32)
    alpha = colour[:, :, 3:] / np.float32(255)
    scene *= 1 - _SHADOW * _shadow(placed, size, generator)
    scene += alpha * (colour[:, :, :3] - scene)
    return _expose(scene, size, generator)


def background(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """A surface without an object: float32 [size, size, 3], 0 to 255."""
    base = generator.uniform(55, 205) + generator.uniform(-26, 26, 3)
    surface = _SURFACES[generator.integers(len(_SURFACES))]
    depth = generator.uniform(14, 34) * (1 + generator.uniform(-0.15, 0.15, 3))
    relief = surface(size, generator)[:, :, None]
    return base.astype(np.float32) + relief * depth.astype(np.float32)


def _place(drawing: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """The drawing scaled, turned and moved into an RGBA frame; at most a twelfth of it may leave the frame."""
    side = size * generator.uniform(0.62, 0.92)
    free = (size - side) / 2 + side / 24
    centre_x, centre_y = size / 2 + generator.uniform(-free, free, 2)
    angle = math.radians(generator.uniform(-14, 14))
    zoom = drawing.width / side
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    half = drawing.width / 2
    matrix = (cos, sin, half - cos * centre_x - sin * centre_y, -sin, cos, half + sin * centre_x - cos * centre_y)
    return drawing.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def _shadow(placed: Image.Image, size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """The object's soft shadow, 0 to 1: float32 [size, size, 1]."""
    soft = placed.getchannel("A").filter(ImageFilter.BoxBlur(size / 28))
    reach = max(1, round(size / 24))
    right, down = generator.integers(-reach, reach + 1), generator.integers(0, reach + 1)
    shade = np.asarray(soft, dtype=np.float32) / np.float32(255)
    return np.roll(shade, (int(down), int(right)), axis=(0, 1))[:, :, None]


def _expose(scene: NDArray[np.float32], size: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Light, lens and sensor: uint8 [size, size, 3]."""
    across, down = generator.uniform(-0.22, 0.22, 2)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + across * ramp[None, :] + down * ramp[:, None]
    gain = generator.uniform(0.78, 1.18) * (1 + generator.uniform(-0.05, 0.05, 3))
    lit: NDArray[np.float32] = scene * light.astype(np.float32)[:, :, None] * gain.astype(np.float32)
    if generator.random() < 0.3:
        frame = Image.fromarray(_to_bytes(lit)).filter(ImageFilter.BoxBlur(size / 64 * generator.uniform(0.15, 0.5)))
        lit = np.asarray(frame, dtype=np.float32)
    noise = generator.standard_normal((size, size, 3), dtype=np.float32)
    return _to_bytes(lit + noise * np.float32(generator.uniform(2, 7)))


def _to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    rounded: NDArray[np.float32] = np.clip(values + np.float32(0.5), 0, 255)
    return rounded.astype(np.uint8)


def _cloud(size: int, rows: int, columns: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Smooth noise, -1 to 1, whose grain is a grid of rows by columns: float32 [size, size]."""
    grid = generator.uniform(-1, 1, (max(1, rows), max(1, columns))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR))


def _position(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Distance along a random direction, 0 to about 1 over the frame, from a random start: float32 [size, size]."""
    angle = generator.uniform(0, math.pi)
    ramp = np.arange(size, dtype=np.float32) / np.float32(size)
    return (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None] + generator.random()).astype(np.float32)


def _wave(position: NDArray[np.float32]) -> NDArray[np.float32]:
    """A smooth wave of period 1, -1 to 1, made of parabolas."""
    triangle: NDArray[np.float32] = 1 - 4 * np.abs(position % 1 - np.float32(0.5))
    wave: NDArray[np.float32] = triangle * (2 - np.abs(triangle))
    return wave


def _matt(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Painted sheet: hardly any texture."""
    return _cloud(size, 3, 3, generator) * 0.8


def _mottled(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Cardboard or stone: grain at three scales."""
    grain: NDArray[np.float32] = 0.6 * _cloud(size, 5, 5, generator) + 0.5 * _cloud(size, 14, 14, generator)
    grain += 0.35 * _cloud(size, 40, 40, generator)
    return grain


def _brushed(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Brushed metal: fine lines, with or across the line's direction."""
    lines = 0.8 * _cloud(size, 56, 3, generator) + 0.4 * _cloud(size, 20, 2, generator)
    return lines if generator.random() < 0.5 else np.ascontiguousarray(lines.T)


def _ribbed(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """A ribbed conveyor belt."""
    ribs = _wave(_position(size, generator) * generator.uniform(5, 13))
    return 0.7 * ribs + 0.3 * _cloud(size, 10, 10, generator)


def _woven(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Cloth or wire mesh: two families of ribs."""
    count = generator.uniform(6, 12)
    crossing = _wave(_position(size, generator) * count) + _wave(_position(size, generator) * count)
    return 0.45 * crossing + 0.3 * _cloud(size, 6, 6, generator)


def _planks(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Boards, tiles or rollers: bands of different shade with dark seams."""
    position = _position(size, generator)
    place = (position - position.min()) * generator.uniform(2.5, 5)
    band = np.floor(place).astype(np.int64)
    shade: NDArray[np.float32] = generator.uniform(-0.7, 0.7, int(band.max()) + 1).astype(np.float32)[band]
    shade += 0.35 * _cloud(size, 30, 4, generator)
    shade[place % 1 < 0.09] -= 1.2
    return shade


_SURFACES: tuple[Callable[[int, np.random.Generator], NDArray[np.float32]], ...] = (
    _matt,
    _mottled,
    _brushed,
    _ribbed,
    _woven,
    _planks,
)
