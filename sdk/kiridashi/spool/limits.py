"""How much a spool keeps, and what leaves when there is no room."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kiridashi.spool.entries import Kind, Place

RANDOM_SHARE = 0.25
_MIB = 1024 * 1024


class SpoolLimits(msgspec.Struct, frozen=True):
    """How much is kept and how often something is written.

    Attributes:
        frames: files in ``frames`` at most.
        bytes: and their bytes.
        frame_bytes: larger frames are halved until they are not above it.
        filling_s: seconds between two writes while there is room.
        full_s: seconds between two writes when each displaces a frame; bounds the wear of the disk.
        rest_s: after a write failed, nothing is tried for so long.
        free_disk_bytes: always left free on the disk.
        fading_s: running time after which a frame's rank has fallen by 1.
        sample_s: seconds between two frames whose statistics are noted for the drift watch.
        sample_write_s: seconds between two files of statistics.
    """

    frames: int = 512
    bytes: int = 64 * _MIB
    frame_bytes: int = _MIB
    filling_s: float = 0.25
    full_s: float = 10.0
    rest_s: float = 30.0
    free_disk_bytes: int = 32 * _MIB
    fading_s: float = 7 * 24 * 3600.0
    sample_s: float = 2.0
    sample_write_s: float = 60.0


def displaced(places: Sequence[Place], size: int, kind: Kind, limits: SpoolLimits) -> list[Place]:
    """Which of a set's frames (lowest rank first) have to leave for one more of ``size`` bytes."""
    share = RANDOM_SHARE if kind == "random" else 1 - RANDOM_SHARE
    frames, space = max(1, int(limits.frames * share)), limits.bytes * share
    total, number = sum(place.bytes for place in places) + size, len(places) + 1
    leaving = []
    for place in places:
        if number <= frames and total <= space:
            break
        leaving.append(place)
        number, total = number - 1, total - place.bytes
    return leaving
