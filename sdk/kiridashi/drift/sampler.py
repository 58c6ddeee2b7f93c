"""The line's end of the watch: now and then a frame is taken, and a thread notes its statistics.

Taking a frame costs a copy; all others cost a look at the clock. Frames are taken by the clock and not by what they
show, or the watch would see another line than there is.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kiridashi.drift.rows import Row, RowFile, RowFolder, shortened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS_PER_FILE = 128
_WAITING_LIMIT = 4
_NICE = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Taken:
    at_s: float
    frame: Any
    values: Any
    digest: str
    size: tuple[int, int]


class Sampler:
    """Samples the frames of one line. It may be used from several threads; :meth:`offer` never raises.

    Args:
        folder: where the rows go.
        every_s: seconds between two samples.
        write_every_s: seconds between two files; a process that dies loses so much.
        free_disk_bytes: nothing is written when less is free.

    Attributes:
        noted: frames whose statistics were noted in this process.
        error: why the last one that could not be was not.
    """

    def __init__(self, folder: RowFolder, every_s: float, write_every_s: float, free_disk_bytes: int) -> None:
        self.folder = folder
        self.noted, self.error = 0, ""
        self._every_s, self._write_every_s, self._free_disk_bytes = every_s, write_every_s, free_disk_bytes
        self._next = 0.0
        self._lock = threading.Lock()
        self._waiting: queue.Queue[_Taken | None] = queue.Queue(_WAITING_LIMIT)
        self._thread: threading.Thread | None = None
        self._closed = False

    def offer(self, frame: NDArray[np.uint8], values: NDArray[np.float32], digest: str, size: tuple[int, int]) -> None:
        """Consider one predicted frame; arguments as :meth:`kiridashi.spool.Spool.offer`, ``size`` the model's."""
        now = time.monotonic()
        if now < self._next or self._closed:
            return
        try:
            with self._lock:
                if now < self._next:
                    return
                self._next = now + self._every_s
                if self._thread is None or not self._thread.is_alive():  # not alive: a fork of the one that began
                    self._waiting = queue.Queue(_WAITING_LIMIT)
                    self._thread = threading.Thread(target=self._work, name=f"drift-{self.folder.line}", daemon=True)
                    self._thread.start()
            self._waiting.put_nowait(_Taken(time.time(), frame.copy(), values.copy(), digest, size))
        except queue.Full:
            self._note("statistics are slower than samples come")
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a sample, the line must not stop
            self._note(f"a frame cannot be sampled: {error}")

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is there and end the thread; gives up after ``timeout_s``."""
        self._closed = True
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        thread.join(timeout_s)

    def _work(self) -> None:
        from kiridashi.drift.statistics import NAMES, frame_statistics

        # On Linux this is the thread's own priority: predictions go first on a device with one core.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        digest, due = "", time.monotonic() + self._write_every_s
        rows: list[Row] = []
        while True:
            taken = self._next_taken(due)
            if not isinstance(taken, _Taken) or taken.digest != digest or len(rows) >= ROWS_PER_FILE:
                self._write(RowFile(digest, NAMES, tuple(rows)))
                rows, due = [], time.monotonic() + self._write_every_s
            if taken == "end":
                return
            if isinstance(taken, _Taken):
                digest = taken.digest
                try:
                    numbers = frame_statistics(taken.frame, taken.values, taken.size).tolist()
                    rows.append(shortened(Row(taken.at_s, int(taken.values.argmax()), tuple(numbers))))
                    self.noted += 1
                except Exception as error:  # noqa: BLE001 - as in offer
                    self._note(f"a frame has no statistics: {error}")

    def _next_taken(self, due: float) -> _Taken | Literal["end", "due"]:
        try:
            return self._waiting.get(timeout=max(0.0, due - time.monotonic())) or "end"
        except queue.Empty:
            return "due"

    def _write(self, file: RowFile) -> None:
        if not file.rows:
            return
        try:
            place = next(path for path in (self.folder.path, *self.folder.path.parents) if path.is_dir())
            disk = os.statvfs(place)
            if disk.f_bavail * disk.f_frsize < self._free_disk_bytes:
                raise OSError("the disk is nearly full")
            self.folder.add(file)
        except OSError as error:
            self._note(f"statistics cannot be written to {self.folder.path}: {error}")

    def _note(self, reason: str) -> None:
        if reason != self.error:
            self.error = reason
            _log.warning("line=%s %s", self.folder.line, reason)
