"""A memory limit around one child process: the kernel's control group where it can be had, else resource limits.

Control groups count what the child touches first, so pages of shared libraries that are already in memory are not
charged to it: the limit is a ceiling against running the device out of memory, the verdict on a budget is taken from
the measured peak. Without a writable memory controller (Raspberry Pi OS ships with it off) the child has
``RLIMIT_DATA``, which counts *reserved* private memory and so is set with headroom. Either way the child's resident set
is also watched from outside (:mod:`kiridashi_agent.process`); the kernel's limit is for bursts between two looks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

_LOG = logging.getLogger(__name__)
MemoryLimit = Literal["cgroup", "rlimit", "none"]
_ROOT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_PREFIX = "kiridashi-job-"
_AGENT_GROUP = "agent"
_numbers = count()


class Cage(Protocol):
    """A limit that a process can be put under. Used as a context manager: leaving it frees the kernel's resources."""

    kind: MemoryLimit

    def __enter__(self) -> Cage: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def add(self, pid: int) -> None:
        """Put a process under the limit, before it is told what to do."""

    def was_hit(self) -> bool:
        """Whether the kernel killed a process for going over the limit."""


class OpenCage:
    """No kernel limit: ``kind`` says whether the child's own resource limit is used instead."""

    def __init__(self, kind: Literal["rlimit", "none"]) -> None:
        self.kind: MemoryLimit = kind

    def __enter__(self) -> OpenCage:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add(self, pid: int) -> None:
        """Nothing to do: the child limits itself."""

    def was_hit(self) -> bool:
        """Never: a resource limit makes allocations fail, it does not kill."""
        return False


class CgroupCage:
    """A control group of one child process; removed on leaving, when the child has gone."""

    kind: MemoryLimit = "cgroup"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> CgroupCage:
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._folder)

    def add(self, pid: int) -> None:
        """Move the process into the group."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def was_hit(self) -> bool:
        """Whether the group's ``oom_kill`` counter is above zero."""
        for name in ("memory.events", "memory.oom_control"):
            path = self._folder / name
            if path.is_file():
                fields = dict(line.split() for line in path.read_text().splitlines())
                return int(fields.get("oom_kill", "0")) > 0
        return False


def open_cage(limit_bytes: int | None, root: Path = _ROOT) -> Cage:
    """The strictest cage that this process may make for ``limit_bytes``; ``None`` means no limit."""
    if limit_bytes is None:
        return OpenCage("none")
    for parent, names in _parents(root):
        folder = parent / f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        try:
            _sweep(parent)
            folder.mkdir()
            (folder / names[0]).write_text(str(limit_bytes))
        except OSError:
            _remove(folder)
            continue
        _forbid_swap(folder, names[1], limit_bytes)
        return CgroupCage(folder)
    return OpenCage("rlimit")


def take_over_own_group(root: Path = _ROOT, groups: Path = _OWN_GROUPS, uid: int | None = None) -> bool:
    """Make room for jobs' groups where the service manager has handed its group over to this account (``Delegate=``).

    Version 2 allows limits below a group only while no process is in the group itself, so this process moves one down.
    ``False``, and nothing changed, where the group is not ours or not ours alone; never for root, who owns all groups.

    Sources: the kernel's cgroup-v2 documentation, "No Internal Process Constraint"; systemd's "Control Group APIs and
    Delegation".
    """
    uid = os.geteuid() if uid is None else uid
    try:
        own = next(root / line[3:].lstrip("/") for line in groups.read_text().splitlines() if line.startswith("0::"))
        if uid == 0 or own.stat().st_uid != uid or "memory" not in (own / "cgroup.controllers").read_text().split():
            return False
        if (own / "cgroup.procs").read_text().split() != [str(os.getpid())]:
            return False
        inner = own / _AGENT_GROUP
        inner.mkdir(exist_ok=True)
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        (own / "cgroup.subtree_control").write_text("+memory")
    except (OSError, StopIteration) as error:
        _LOG.info("jobs cannot have control groups here: %s", error)
        return False
    return True


def _parents(root: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Groups under which one may be made (version 1 or 2), nearest first, with the names of the two limit files."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        inner = path.lstrip("/")
        if "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            yield from ((parent, names) for parent in dict.fromkeys((base / inner, base)) if parent.is_dir())
        elif number == "0":
            own = root / inner
            for parent in dict.fromkeys((own, own.parent)):
                control = parent / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text().split():
                    yield parent, ("memory.max", "memory.swap.max")


def _forbid_swap(folder: Path, name: str, limit_bytes: int) -> None:
    """Version 1 limits memory and swap together, version 2 swap alone; kernels without swap accounting have neither."""
    path = folder / name
    if path.is_file():
        path.write_text(str(limit_bytes if "memsw" in name else 0))


def _sweep(parent: Path) -> None:
    """Remove groups that a killed agent left behind."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if not Path("/proc", owner).exists():
            _remove(folder)


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError:
        # A process is still leaving the group; the next cage's sweep removes it once this agent has ended.
        return
