"""Samples that a device keeps for its next tuning, and which frames were ever learnt from or held out.

One file, ``<state>/spool/<line>/kept.zip``, replaced as a whole: ``index.json`` and the raw pixels. Like the rest of
the spool it belongs to the device alone (mode 0600) and is never sent anywhere. Nothing here imports numpy.

Kept is, of every class and of both parts, a uniform draw of all frames that were ever tuned on: those whose content
hashes are the lowest (a bottom-k sketch; Cohen and Kaplan 2007). It needs no counters, and frames may come again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from kiridashi.artifacts import sync_folder
from kiridashi.errors import StateError
from kiridashi.messages import check_name

_log = logging.getLogger(__name__)
KEPT_NAME = "kept.zip"
_FORMAT: Literal["kiridashi-kept/1"] = "kiridashi-kept/1"
_INDEX, _PIXELS = "index.json", "pixels.bin"
_MIB = 1024 * 1024
MAX_FRAME_BYTES = _MIB
MAX_INDEX_BYTES = 16 * _MIB
MAX_PARTS = 50_000
_KEY_DIGITS = 32
# Of flipped bits zipfile makes, among others, another compression, a newer version, or an encrypted entry.
_DAMAGE = (zipfile.BadZipFile, KeyError, ValueError, msgspec.MsgspecError, EOFError, RuntimeError, zlib.error)


class KeptFrame(msgspec.Struct, frozen=True):
    """What is known of a kept frame.

    ``key`` is :func:`frame_key` of the frame as it came, ``holdout`` its part for good, ``entry`` its name in the spool
    if a person named it there; ``height · width · 3`` bytes of pixels belong to it.
    """

    key: str
    label: str
    holdout: bool
    height: int
    width: int
    entry: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of its pixels."""
        return self.height * self.width * 3


class KeptIndex(msgspec.Struct, frozen=True):
    """The kept frames in the order of their pixels, and for every frame ever tuned on whether it is held out."""

    frames: tuple[KeptFrame, ...] = ()
    parts: dict[str, bool] = {}
    format: Literal["kiridashi-kept/1"] = _FORMAT

    def counts(self) -> dict[str, int]:
        """Kept frames by class."""
        found: dict[str, int] = {}
        for frame in self.frames:
            found[frame.label] = found.get(frame.label, 0) + 1
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class KeptLimits:
    """How many frames of a class are kept to learn from and to judge by, and the bytes of all."""

    learn: int = 60
    hold: int = 40
    bytes: int = 48 * _MIB


def frame_key(height: int, width: int, pixels: bytes) -> str:
    """What tells frames apart: 32 hex digits of SHA-256 over size and pixels."""
    return hashlib.sha256(f"{height}x{width}:".encode() + pixels).hexdigest()[:_KEY_DIGITS]


class KeptSamples:
    """The kept samples of one line. Raises InputError if the line's name is not a safe name."""

    def __init__(self, state_dir: Path, line: str) -> None:
        self.path = state_dir / "spool" / check_name(line, "line") / KEPT_NAME

    def index(self) -> KeptIndex:
        """What is kept; empty if nothing is, or the file is damaged. A damaged file is set aside.

        Raises:
            StateError: the file is there and cannot be read.
        """
        return self._read(pixels=False)[0]

    def frames(self) -> list[tuple[KeptFrame, bytes]]:
        """The kept frames with their pixels. Raises as :meth:`index`."""
        return self._read(pixels=True)[1]

    def write(self, frames: Sequence[tuple[KeptFrame, bytes]], parts: Mapping[str, bool]) -> None:
        """Keep these frames and remember these parts; the newest ``MAX_PARTS``, learnt ones leave first.

        Raises:
            StateError: it cannot be written; what was kept before still is.
        """
        excess = len(parts) - MAX_PARTS
        leaving = sorted(parts, key=lambda key: parts[key])[:excess] if excess > 0 else []
        remembered = {key: held for key, held in parts.items() if key not in set(leaving)}
        index = KeptIndex(tuple(frame for frame, _ in frames), remembered)
        if self.path.is_file() and index == self.index():
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._replace(index, frames)
        except OSError as error:
            step = "make room on the disk, then tune again"
            raise StateError(f"samples cannot be kept in {self.path}", why=str(error), next_step=step) from error

    def _replace(self, index: KeptIndex, frames: Sequence[tuple[KeptFrame, bytes]]) -> None:
        """Write frame by frame, so that memory holds the pixels once; what a kill leaves is overwritten next time."""
        part = self.path.with_name(KEPT_NAME + ".part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                with zipfile.ZipFile(file, "w") as archive:
                    archive.writestr(_INDEX, msgspec.json.encode(index))
                    with archive.open(_PIXELS, "w") as out:
                        for _, pixels in frames:
                            out.write(pixels)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(self.path.parent)

    def forget(self) -> int:
        """Delete the kept frames and return how many there were.

        The hashes stay: a frame that was held out once must not be learnt from when it comes again.

        Raises: as :meth:`index` and :meth:`write`.
        """
        index = self.index()
        if index.frames:
            self.write((), index.parts)
        return len(index.frames)

    def _read(self, *, pixels: bool) -> tuple[KeptIndex, list[tuple[KeptFrame, bytes]]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.getinfo(_INDEX).file_size > MAX_INDEX_BYTES:
                    raise ValueError("the index is too large")
                index = msgspec.json.decode(archive.read(_INDEX), type=KeptIndex)
                size = sum(frame.bytes for frame in index.frames)
                stored = archive.getinfo(_PIXELS)
                if any(min(frame.height, frame.width) < 1 for frame in index.frames):
                    raise ValueError("a frame has no size")
                if stored.compress_type != zipfile.ZIP_STORED:  # packed, it could be larger than any memory
                    raise ValueError("the pixels are packed")
                if stored.file_size != size:
                    raise ValueError("the pixels do not fit the index")
                if not pixels:
                    return index, []
                with archive.open(_PIXELS) as source:
                    return index, [(frame, source.read(frame.bytes)) for frame in index.frames]
        except FileNotFoundError:
            return KeptIndex(), []
        except (*_DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a place before the file's start
                raise StateError(f"the kept samples {self.path} cannot be read", why=str(error)) from error
            aside = self.path.with_name(KEPT_NAME + ".damaged")
            self.path.replace(aside)
            _log.error("the kept samples %s were damaged (%s); set aside as %s", self.path, error, aside.name)
            return KeptIndex(), []


def choose_kept(
    frames: Sequence[tuple[KeptFrame, bytes]], limits: KeptLimits | None = None
) -> list[tuple[KeptFrame, bytes]]:
    """Which frames stay: per class and part those with the lowest keys, fewer of each while they are too large. Pure.

    The order is that of the keys, so the same frames give the same file.
    """
    limits = limits or KeptLimits()
    ordered = sorted(frames, key=lambda pair: pair[0].key)
    learn, hold = limits.learn, limits.hold
    while True:
        seen: dict[tuple[str, bool], int] = {}
        chosen = []
        for frame, pixels in ordered:
            group = frame.label, frame.holdout
            seen[group] = seen.get(group, 0) + 1
            if seen[group] <= (hold if frame.holdout else learn):
                chosen.append((frame, pixels))
        if sum(frame.bytes for frame, _ in chosen) <= limits.bytes or max(learn, hold) <= 1:
            return chosen
        learn, hold = max(1, learn * 3 // 4), max(1, hold * 3 // 4)
