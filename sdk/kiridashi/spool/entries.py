"""One kept frame as a file: a magic word, the header's length, the header as JSON, the raw pixels.

Pixels are stored as they are. Packing them as PNG takes a hundred times as long as writing them, and a spool is
bounded in bytes either way.
"""

from __future__ import annotations

import math
import re
import secrets
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import msgspec

from kiridashi.errors import StateError

Kind = Literal["uncertain", "random"]

MAX_SIDE = 16384
MAX_VALUES = 4096
MAX_HEADER_BYTES = 256 * 1024
MAX_PIXEL_BYTES = 4 * 1024 * 1024
MAX_FILE_BYTES = 8 + MAX_HEADER_BYTES + MAX_PIXEL_BYTES
_MAGIC = b"KDF1"
_PREFIX = struct.Struct("<4sI")
_LETTERS: dict[Kind, str] = {"uncertain": "u", "random": "r"}
_KINDS: dict[str, Kind] = {letter: kind for kind, letter in _LETTERS.items()}
_NAME = re.compile(r"([ur])-([0-9a-f]{14})-([0-9a-f]{10})-[0-9a-f]{12}\.frame")
_RANK_SCALE, _RANK_OFFSET = 1e9, 64.0
_CLOCK_SCALE = 10.0


class FrameHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands before the pixels.

    ``values`` are the model's probabilities and ``labels`` their class names; ``digest`` is the model that said so.
    ``time_s`` is the device's clock, which may be wrong: nothing is decided by it. ``crc`` is the CRC-32 of the pixels.
    """

    line: str
    digest: str
    time_s: float
    height: int
    width: int
    values: tuple[float, ...]
    labels: tuple[str, ...]
    crc: int

    @property
    def margin(self) -> float:
        """How far the best value is above the second: 0 is a tie, 1 is certainty."""
        second, best = sorted((*self.values, 1.0 - self.values[0]) if len(self.values) == 1 else self.values)[-2:]
        return best - second


@dataclass(frozen=True)
class Frame:
    """A frame read back: ``pixels`` are ``height · width · 3`` bytes, rows of RGB."""

    header: FrameHeader
    pixels: bytes


@dataclass(frozen=True)
class Place:
    """What a file's name says: why it was kept, its rank (the lowest leaves first), and at what running time."""

    name: str
    kind: Kind
    rank: float
    clock_s: float
    bytes: int


def new_name(kind: Kind, rank: float, clock_s: float) -> str:
    """A fresh file name; names of one kind sort by rank."""
    number = round((rank + _RANK_OFFSET) * _RANK_SCALE)
    return f"{_LETTERS[kind]}-{number:014x}-{round(clock_s * _CLOCK_SCALE):010x}-{secrets.token_hex(6)}.frame"


def parse_name(name: str, size: int) -> Place | None:
    """The place that a file name describes, ``None`` if it is not one of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    rank = int(match[2], 16) / _RANK_SCALE - _RANK_OFFSET
    return Place(name, _KINDS[match[1]], rank, int(match[3], 16) / _CLOCK_SCALE, size)


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a file."""
    header = msgspec.json.encode(frame.header)
    return _PREFIX.pack(_MAGIC, len(header)) + header + frame.pixels


def decode_header(data: bytes, source: str) -> tuple[FrameHeader, int]:
    """The header at the beginning of ``data``, and where the pixels begin.

    Raises:
        StateError: it is not a frame, or not a whole header.
    """
    if len(data) < _PREFIX.size:
        raise StateError(f"{source} is not a kept frame", why="it is too short")
    magic, length = _PREFIX.unpack_from(data)
    end = _PREFIX.size + length
    if magic != _MAGIC or length > MAX_HEADER_BYTES or len(data) < end:
        raise StateError(f"{source} is not a kept frame", why="it does not begin like one, or is cut off")
    try:
        header = msgspec.json.decode(data[_PREFIX.size : end], type=FrameHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"{source} is not a kept frame", why=str(error)) from error
    sides = (header.height, header.width)
    if not all(1 <= side <= MAX_SIDE for side in sides) or not 1 <= len(header.values) <= MAX_VALUES:
        raise StateError(f"{source} is not a kept frame", why="its sizes are out of range")
    if len(header.labels) not in (0, len(header.values)) or not all(map(math.isfinite, header.values)):
        raise StateError(f"{source} is not a kept frame", why="its values do not fit its labels")
    return header, end


def decode_frame(data: bytes, source: str) -> Frame:
    """The whole frame.

    Raises:
        StateError: it is torn, damaged, or not a frame.
    """
    header, start = decode_header(data, source)
    pixels = data[start:]
    if len(pixels) != header.height * header.width * 3 or zlib.crc32(pixels) != header.crc:
        raise StateError(f"{source} is damaged", why="its pixels are not those that were written")
    return Frame(header, pixels)
