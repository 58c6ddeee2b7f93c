"""Reading pictures without an imaging library: PNG, binary PPM and ``.npy``, as uint8 RGB.

PNG follows the W3C recommendation (third edition): 8 bits a sample, grey, RGB, palette, with or without alpha, not
interlaced. Transparency is ignored: a camera has none. Other formats have to be converted on another computer.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import InputError

SUFFIXES = (".png", ".ppm", ".npy")
MAX_SIDE = 16384
MAX_PIXELS = 32 * 1024 * 1024
MAX_FILE_BYTES = 4 * MAX_PIXELS
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_GREY, _PALETTE = (0, 4), 3
_PPM = re.compile(rb"P6\s(?:#[^\n]*\n)*\s*(\d{1,5})\s+(\d{1,5})\s+255\s")


def read_picture(path: Path) -> NDArray[np.uint8]:
    """One picture, uint8 RGB [H, W, 3].

    Raises:
        InputError: it cannot be read, is damaged, too large, or of a kind that is not understood.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is over {MAX_FILE_BYTES} bytes")
        if path.suffix.lower() == ".npy":
            # Mapped: the header alone reserves no memory, and neither an archive nor pickled objects are taken.
            image = np.array(np.lib.format.open_memmap(path, mode="r"))
        else:
            data = path.read_bytes()
            image = _decode_png(data) if data.startswith(_SIGNATURE) else _decode_ppm(data)
    except (OSError, ValueError, OverflowError, EOFError, LookupError, struct.error, zlib.error) as error:
        step = "store it as 8-bit PNG, or pack it with kiridashi.samples.write_samples"
        raise InputError(f"the picture {path} cannot be read", why=str(error), next_step=step) from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"{path} holds {image.dtype} {list(image.shape)}", why="a frame is uint8 RGB [H, W, 3]")
    return np.ascontiguousarray(image)


def _decode_ppm(data: bytes) -> NDArray[np.uint8]:
    match = _PPM.match(data)
    if match is None:
        raise ValueError("it is neither PNG nor binary PPM with 8 bits")
    width, height = int(match[1]), int(match[2])
    _check_size(width, height)
    pixels = np.frombuffer(data, np.uint8, offset=match.end())
    return pixels[: height * width * 3].reshape(height, width, 3)


def _decode_png(data: bytes) -> NDArray[np.uint8]:
    chunks = _chunks(data)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    _check_size(width, height)
    if depth != 8 or colour not in _CHANNELS or interlaced:
        raise ValueError(f"a PNG of {depth} bits, colour type {colour}, interlaced {interlaced} is not understood")
    channels = _CHANNELS[colour]
    size = height * (1 + width * channels)
    packed = zlib.decompressobj()
    raw = packed.decompress(chunks[b"IDAT"], size)
    if len(raw) != size:
        raise ValueError("its pixels are cut off")
    samples = _unfiltered(np.frombuffer(raw, np.uint8).reshape(height, -1), channels).reshape(height, width, channels)
    if colour == _PALETTE:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
        return palette[samples[:, :, 0]]
    return samples[:, :, [0, 0, 0]] if colour in _GREY else samples[:, :, :3]


def _check_size(width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE) or width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are out of range")


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks by type, those of one type joined; the check sums are verified."""
    found: dict[bytes, bytearray] = {}
    place = len(_SIGNATURE)
    while b"IEND" not in found:
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(kind + body) != checksum:
            raise ValueError("a check sum is wrong")
        found.setdefault(kind, bytearray()).extend(body)
        place += 12 + length
    for kind in (b"IHDR", b"IDAT"):
        if kind not in found:
            raise ValueError(f"it has no {kind.decode()} chunk")
    return {kind: bytes(body) for kind, body in found.items()}


def _unfiltered(rows: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Undo the filter that the first byte of every row names (section 9 of the recommendation)."""
    above = np.zeros(rows.shape[1] - 1, np.uint8)
    out = np.empty((len(rows), len(above)), np.uint8)
    for number, row in enumerate(rows):
        kind, line = int(row[0]), row[1:]
        if kind == 0:
            above = line
        elif kind == 1:
            above = np.cumsum(line.reshape(-1, channels), axis=0, dtype=np.uint8).ravel()
        elif kind == 2:
            above = line + above
        elif kind in (3, 4):
            above = _against_both(line, above, channels, paeth=kind == 4)
        else:
            raise ValueError(f"the row filter {kind} does not exist")
        out[number] = above
    return out


def _against_both(
    line: NDArray[np.uint8], above: NDArray[np.uint8], channels: int, *, paeth: bool
) -> NDArray[np.uint8]:
    """The filters Average and Paeth, where every sample needs the one to its left."""
    up = [0] * channels + above.tolist()
    out = [0] * channels
    for number, value in enumerate(line.tolist(), channels):
        left, over, corner = out[number - channels], up[number], up[number - channels]
        guess = _paeth(left, over, corner) if paeth else (left + over) >> 1
        out.append((value + guess) & 0xFF)
    return np.array(out[channels:], np.uint8)


def _paeth(left: int, over: int, corner: int) -> int:
    base = left + over - corner
    near = (abs(base - left), abs(base - over), abs(base - corner))
    return (left, over, corner)[near.index(min(near))]
