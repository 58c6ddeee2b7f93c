"""The line's end of the spool: offering a frame costs microseconds, and everything slow happens in a thread.

Two sets are kept. *Uncertain* frames are those whose best two values are closest; a *random* draw stands beside them,
so that what people name is not odd frames only. In both a frame's rank is fixed when it is offered:

- uncertain: ``1 - margin + age``,
- random: ``g + age`` with Gumbel noise ``g = -log(-log(u))``. The frames with the highest ranks are then a weighted
  draw without replacement (Efraimidis and Spirakis 2006, in the form of the Gumbel-max trick), whoever wrote them. A
  coin decides first whether a frame takes part in the draw; on a slow line, where every frame is the best of its
  interval in both ways, all would be drawn and none be left for the other set.

``age`` is the running time of the line over ``fading_s``: a frame loses against one that is by 1 more certain but so
much newer, and a random frame's weight falls by e. Running time goes on from the newest frame in the folder and not
from the clock, which may be wrong.

Of the frames between two writes only the best of each set is written, so a flood costs a copy now and then.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kiridashi.drift.rows import RowFolder
from kiridashi.drift.sampler import Sampler
from kiridashi.slots import default_state_dir
from kiridashi.spool.entries import (
    MAX_PIXEL_BYTES,
    MAX_SIDE,
    MAX_VALUES,
    Frame,
    FrameHeader,
    Kind,
    Place,
    encode_frame,
    new_name,
)
from kiridashi.spool.folder import SpoolFolder, remove
from kiridashi.spool.limits import RANDOM_SHARE, SpoolLimits, displaced

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpoolCounts:
    """What this process has offered, written, and could not use or write; ``error`` is the last reason."""

    offered: int
    written: int
    failed: int
    error: str


@dataclass(frozen=True, eq=False)
class _Candidate:
    rank: float
    clock_s: float
    frame: Any
    values: Any
    digest: str
    labels: tuple[str, ...]


class Spool:
    """Offers frames of one line to be kept. Make it with :meth:`open`; it may be used from several threads.

    The folder is made, filled and cleaned by a thread that starts with the first frame worth keeping. ``seed`` fixes
    the random draw. Beside the frames, ``sampler`` notes statistics of some of them for the drift watch.
    """

    def __init__(self, folder: SpoolFolder, limits: SpoolLimits, seed: int | None = None) -> None:
        self.folder, self.limits = folder, limits
        rows = RowFolder(folder.root.parent.parent, folder.line)
        self.sampler = Sampler(rows, limits.sample_s, limits.sample_write_s, limits.free_disk_bytes)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._waiting: dict[Kind, _Candidate] = {}
        self._bars: dict[Kind, float] = {"uncertain": -math.inf, "random": -math.inf}
        self._offered = self._written = self._failed = 0
        self._error = ""
        self._rest_until = 0.0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._clock_ahead_s = self._begin() - time.monotonic()

    @classmethod
    def open(cls, line: str, state_dir: Path | str | None = None, limits: SpoolLimits | None = None) -> Spool:
        """The spool of a line; looks at what is in it, and makes nothing yet.

        Raises:
            InputError: not a line name.
        """
        folder = default_state_dir() if state_dir is None else Path(state_dir)
        return cls(SpoolFolder(folder, line), limits or SpoolLimits())

    def offer(
        self, frame: NDArray[np.uint8], values: NDArray[np.float32], digest: str, labels: Sequence[str] = ()
    ) -> None:
        """Consider one predicted frame. Never raises and never waits for the disk; most frames are not even copied.

        Args:
            frame: uint8 RGB [H, W, 3]; copied if it is a candidate, so the caller may reuse it.
            values: probabilities, float [classes].
            digest: the model that predicted.
            labels: the class names, in the order of ``values``; without them nothing can be guessed later.
        """
        try:
            self._consider(frame, values, digest, labels)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with keeping a frame, the line must not stop
            self._note_failure(f"a frame cannot be kept: {error}")

    def counts(self) -> SpoolCounts:
        """What has happened so far in this process."""
        with self._lock:
            return SpoolCounts(self._offered, self._written, self._failed, self._error)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is waiting and end the thread; gives up after ``timeout_s`` if the disk hangs."""
        self._closing.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        self.sampler.close(timeout_s)

    def _begin(self) -> float:
        """The running time to go on from, seconds."""
        try:
            places = self.folder.scan(self.folder.frames)
        except OSError as error:
            self._note_failure(f"{self.folder.frames} cannot be read: {error}")
            return 0.0
        self._set_bars(places)
        return max((place.clock_s for place in places), default=0.0)

    def _consider(
        self, frame: NDArray[np.uint8], values: NDArray[np.float32], digest: str, labels: Sequence[str]
    ) -> None:
        now = time.monotonic()
        with self._lock:
            self._offered += 1
            takes_part = self._random.random() < RANDOM_SHARE
            noise = -math.log(-math.log(self._random.random() or math.ulp(0.0)))
        if now < self._rest_until or self._closing.is_set():
            return
        clock_s = now + self._clock_ahead_s
        age = clock_s / self.limits.fading_s
        ranks: dict[Kind, float] = {"uncertain": 1.0 - _margin(values) + age}
        if takes_part:
            ranks["random"] = noise + age
        with self._lock:
            wanted = [kind for kind, rank in ranks.items() if rank > self._bar(kind)]
        if not wanted:
            return
        _check(frame, values, labels)
        kept, numbers, names = frame.copy(), values.copy(), tuple(labels)
        with self._lock:
            for kind in wanted:
                if ranks[kind] > self._bar(kind):
                    self._waiting[kind] = _Candidate(ranks[kind], clock_s, kept, numbers, digest, names)
            if self._thread is None or not self._thread.is_alive():  # not alive: this is a fork of the one that began
                self._thread = threading.Thread(target=self._work, name=f"spool-{self.folder.line}", daemon=True)
                self._thread.start()

    def _bar(self, kind: Kind) -> float:
        waiting = self._waiting.get(kind)
        return self._bars[kind] if waiting is None else max(self._bars[kind], waiting.rank)

    def _work(self) -> None:
        """Write the best of every interval, until there is nothing for a while or the spool is closed."""
        while True:
            closing = self._closing.wait(self._pause_s())
            with self._lock:
                waiting, self._waiting = self._waiting, {}
                if not waiting:
                    self._thread = None
                    return
            try:
                self._store(waiting)
            except OSError as error:
                self._rest_until = time.monotonic() + self.limits.rest_s
                self._note_failure(f"frames cannot be written to {self.folder.frames}: {error}")
            if closing:
                return

    def _pause_s(self) -> float:
        full = all(bar > -math.inf for bar in self._bars.values())
        return self.limits.full_s if full else self.limits.filling_s

    def _store(self, waiting: dict[Kind, _Candidate]) -> None:
        self.folder.prepare()
        disk = os.statvfs(self.folder.frames)
        if disk.f_bavail * disk.f_frsize < self.limits.free_disk_bytes:
            raise OSError("the disk is nearly full")
        uncertain = waiting.get("uncertain")
        if uncertain is not None and "random" in waiting and waiting["random"].frame is uncertain.frame:
            del waiting["uncertain"]  # one file is enough, and taking it out of the draw would bend the draw
        for kind, candidate in waiting.items():
            data = _encoded(candidate, self.folder.line, self.limits.frame_bytes)
            places = [place for place in self.folder.scan(self.folder.frames) if place.kind == kind]
            leaving = displaced(places, len(data), kind, self.limits)
            if leaving and leaving[-1].rank >= candidate.rank:
                continue
            remove(self.folder.frames, leaving)
            self.folder.add(new_name(kind, candidate.rank, candidate.clock_s), data)
            with self._lock:
                self._written += 1
        self._set_bars(self.folder.scan(self.folder.frames))

    def _set_bars(self, places: Sequence[Place]) -> None:
        for kind in self._bars:
            own = [place for place in places if place.kind == kind]
            typical = max((place.bytes for place in own), default=0)
            full = displaced(own, typical, kind, self.limits)
            self._bars[kind] = full[-1].rank if full else -math.inf

    def _note_failure(self, reason: str) -> None:
        with self._lock:
            self._failed += 1
            is_new, self._error = reason != self._error, reason
        if is_new:
            _log.warning("line=%s %s", self.folder.line, reason)


def _margin(values: NDArray[np.float32]) -> float:
    if values.size == 1:
        margin = abs(2.0 * float(values[0]) - 1.0)
    else:
        best = values.copy()
        best.partition(-2)
        margin = float(best[-1] - best[-2])
    if not math.isfinite(margin):
        raise ValueError("the model's values are not finite")
    return margin


def _check(frame: NDArray[np.uint8], values: NDArray[np.float32], labels: Sequence[str]) -> None:
    if frame.dtype != "uint8" or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frames are uint8 RGB [H, W, 3], this one is {frame.dtype} {list(frame.shape)}")
    if max(frame.shape) > MAX_SIDE or values.ndim != 1 or values.size > MAX_VALUES:
        raise ValueError(f"frame {list(frame.shape)} or values {list(values.shape)} are too large")
    if len(labels) not in (0, values.size):
        raise ValueError(f"{values.size} values have {len(labels)} labels")


def _encoded(candidate: _Candidate, line: str, limit: int) -> bytes:
    pixels = candidate.frame
    while pixels.nbytes > min(limit, MAX_PIXEL_BYTES) and min(pixels.shape[:2]) > 1:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        cells = pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        pixels = cells.mean(axis=(1, 3), dtype="float32").round().astype("uint8")
    data = pixels.tobytes()
    header = FrameHeader(
        line=line,
        digest=candidate.digest,
        time_s=time.time(),
        height=pixels.shape[0],
        width=pixels.shape[1],
        values=tuple(round(value, 5) for value in candidate.values.tolist()),
        labels=candidate.labels,
        crc=zlib.crc32(data),
    )
    return encode_frame(Frame(header, data))
