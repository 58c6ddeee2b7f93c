"""Stages that survive a power cut: a long run goes on where it stopped, and never reuses what no longer fits.

A stage works in a folder of its own that is renamed into place, with its result, only when it is complete. It is
reused when its inputs, the program's code and the machine are the same as they were; otherwise it runs again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from kiridashi.artifacts import sync_folder, write_atomic
from kiridashi.errors import InputError, StateError

_RESULT = "stage.json"
_SOURCES = ("kiridashi", "kiridashi_agent", "kiridashi_server")
_LIBRARIES = ("numpy", "onnxruntime", "torch")

Result = TypeVar("Result", bound=msgspec.Struct)


class StageRecord(msgspec.Struct, frozen=True):
    """What a finished stage left behind: its key, its wall time in seconds, and its result as JSON."""

    key: str
    seconds: float
    result: msgspec.Raw


class StageTime(msgspec.Struct, frozen=True):
    """How long a stage took, and whether that was in an earlier run."""

    name: str
    seconds: float
    reused: bool


class Workspace:
    """The folder of one resumable run.

    Args:
        folder: where stages are kept; made if missing.
        announce: called with a stage's name and whether it is reused, before it starts.
    """

    def __init__(self, folder: Path, announce: Callable[[str, bool], None] = lambda name, reused: None) -> None:
        self.folder = folder
        self.times: list[StageTime] = []
        self._announce = announce
        self._stages = folder / "stages"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            InputError: the path exists and is not a folder, or cannot be written.
            StateError: another process works in it.
        """
        try:
            self._stages.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be used as the output folder",
                why=error.strerror or str(error),
                next_step="choose another folder",
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StateError(
                    f"another run is working in {self.folder}", next_step="wait for it, or choose another folder"
                ) from error
            yield
        finally:
            os.close(handle)

    def run(self, name: str, inputs: object, work: Callable[[Path], Result], kind: type[Result]) -> Result:
        """Run a stage, or return what it left when nothing it depends on has changed.

        Args:
            name: the stage's name and folder.
            inputs: everything that decides the result, as plain data.
            work: does the work in the empty folder it is given and returns the result; paths inside the folder
                have to be kept relative to it, for it is renamed afterwards.
            kind: the result's type.
        """
        place = self.place(name)
        key = _key(name, inputs)
        record = _read(place)
        self._announce(name, record is not None and record.key == key)
        if record is not None and record.key == key:
            self.times.append(StageTime(name, record.seconds, reused=True))
            return msgspec.json.decode(record.result, type=kind)
        part = place.with_name(place.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        start = time.monotonic()
        result = work(part)
        seconds = time.monotonic() - start
        raw = msgspec.Raw(msgspec.json.encode(result))
        write_atomic(part / _RESULT, msgspec.json.encode(StageRecord(key, seconds, raw)))
        if place.exists():
            shutil.rmtree(place)
        part.rename(place)
        sync_folder(self._stages)
        self.times.append(StageTime(name, seconds, reused=False))
        return result

    def place(self, name: str) -> Path:
        """The folder of a finished stage."""
        return self._stages / name


def machine() -> str:
    """This machine in a few words: processor, cores, system, Python."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() in ("model name", "Model")), "")
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.machine()}"
    return f"{model or platform.machine()}, {cores} cores, {system}, Python {platform.python_version()}"


def _read(place: Path) -> StageRecord | None:
    try:
        return msgspec.json.decode((place / _RESULT).read_bytes(), type=StageRecord)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _key(name: str, inputs: object) -> str:
    plain = msgspec.to_builtins([name, inputs, code_digest(), machine()], str_keys=True)
    whole = msgspec.json.encode(plain, order="sorted")
    return hashlib.sha256(whole).hexdigest()


@cache
def code_digest() -> str:
    """SHA-256 over the sources of the three packages and the versions of what computes."""
    whole = hashlib.sha256(sys.version.encode())
    for package in _SOURCES:
        module = sys.modules.get(package) or __import__(package)
        for root in map(Path, module.__path__):
            for path in sorted(root.rglob("*.py")):
                whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    for library in _LIBRARIES:
        whole.update(f"{library}={version(library)}".encode())
    return whole.hexdigest()


def plain(value: object) -> Any:
    """Dataclasses and structs as plain data, for stage inputs."""
    return msgspec.to_builtins(value, enc_hook=str)
