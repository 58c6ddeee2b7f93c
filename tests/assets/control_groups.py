"""A kernel limit of memory and processor time around a program, as a small device has it; cgroup version 1 or 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000


@dataclass(frozen=True)
class SmallDevice:
    """The groups of a small device, one or two folders."""

    memory: Path
    processor: Path
    peak_name: str

    def program(self, folder: Path, command: Path) -> Path:
        """A program that runs ``command`` inside the limits."""
        joins = "\n".join(f"echo $$ > {group}/cgroup.procs" for group in {self.memory, self.processor})
        place = folder / f"{command.name}-small"
        place.write_text(f'#!/bin/sh\nset -e\n{joins}\nexec "{command}" "$@"\n')
        place.chmod(0o755)
        return place

    def take_peak_bytes(self) -> int:
        """The most memory that was charged since the last call, page cache included (version 2: since the start)."""
        file = self.memory / self.peak_name
        peak = int(file.read_text()) if file.is_file() else 0
        if "max_usage" in self.peak_name:
            file.write_text("0")
        return peak

    def oom_kills(self) -> int:
        """How often the kernel ended a process for the limit."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.memory / name).is_file():
                rows = dict(row.split() for row in (self.memory / name).read_text().splitlines())
                return int(rows.get("oom_kill", 0))
        return 0


@contextmanager
def small_device(memory_bytes: int, processors: float = 0.0) -> Iterator[SmallDevice]:
    """Groups with these limits (no limit of processor time with 0) for the block.

    Raises:
        pytest.skip: no memory controller can be written here, and the reason.
    """
    name = f"kiridashi-test-{os.getpid()}"
    quota = int(processors * _PERIOD_US)
    first = (ROOT / "memory").is_dir()
    memory = (ROOT / "memory" if first else ROOT) / name
    processor = (ROOT / "cpu" if first else ROOT) / name
    try:
        memory.mkdir()
        processor.mkdir(exist_ok=True)
        _write(memory / ("memory.limit_in_bytes" if first else "memory.max"), memory_bytes)
        if quota and first:
            _write(processor / "cpu.cfs_period_us", _PERIOD_US)
            _write(processor / "cpu.cfs_quota_us", quota)
        elif quota:
            (processor / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
    except OSError as error:
        _remove(memory, processor)
        pytest.skip(f"this machine lets no test make a control group with a memory limit: {error}")
    try:
        yield SmallDevice(memory, processor, "memory.max_usage_in_bytes" if first else "memory.peak")
    finally:
        _remove(memory, processor)


def _remove(*folders: Path) -> None:
    """With the groups that an agent made inside; every process has left."""
    for folder in set(folders):
        if folder.is_dir():
            for inner in folder.glob("*/"):
                inner.rmdir()
            folder.rmdir()


def _write(path: Path, value: int) -> None:
    path.write_text(str(value))
