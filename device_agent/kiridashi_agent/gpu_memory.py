"""Memory that this process holds for a Jetson's GPU, as the kernel's allocator lists it.

GPU and processor share one memory there, and what is allocated for the GPU does not count as the process's resident
set. The list is a debug file that root alone may read.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

_CLIENTS = Path("sys/kernel/debug/nvmap/iovmm/clients")
_ROOT = Path("/")
_LOOK_S = 0.05
_UNITS = {"K": 1024, "M": 1024**2, "B": 1}


def gpu_bytes(pid: int | None = None, root: Path = _ROOT) -> int | None:
    """What process ``pid`` (default: this one) holds; ``None`` where the list is not there or may not be read.

    The list has a line for each client: kind, name, number of the process, and size with its unit (``66820K``).
    """
    try:
        lines = (root / _CLIENTS).read_text(errors="replace").splitlines()
    except OSError:
        return None
    wanted, total = str(pid or os.getpid()), 0
    for line in lines:
        fields = line.split()
        if len(fields) >= 4 and fields[-2] == wanted and fields[-1][:-1].isdigit() and fields[-1][-1] in _UNITS:
            total += int(fields[-1][:-1]) * _UNITS[fields[-1][-1]]
    return total


class GpuPeak:
    """Looks at :func:`gpu_bytes` while something is done that may hold more for a moment: building an engine.

    Attributes:
        bytes: the most that was seen; ``None`` where nothing is reported.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        self.bytes = gpu_bytes(root=root)
        self._root = root
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-memory", daemon=True)

    def __enter__(self) -> GpuPeak:
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self.bytes is not None:
            self._thread.join()
            self._note()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_S):
            self._note()

    def _note(self) -> None:
        now = gpu_bytes(root=self._root)
        if now is not None:
            self.bytes = max(self.bytes or 0, now)
