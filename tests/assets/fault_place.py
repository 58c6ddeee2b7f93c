"""A broker and a fleet, a device that serves version 1, and faults that are done to copies of that device.

The agent is the real program, its children are real, and so is the broker. A fault is put into the agent's processes by
``faults/sitecustomize.py`` and ``faults/disk_faults.c``, never by a hook of the product.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from agent_program import AgentProgram
from control_groups import SmallDevice
from fake_fleet import FakeFleet, MqttResponder, free_port, mosquitto
from kiridashi import LineModel
from kiridashi.budget import Budget
from kiridashi.manifest import Manifest
from kiridashi.messages import Desired, LineDesired
from tiny_bundle import device_tiles, make_bundle, write_device_samples

LINE = "press-3"
ASSETS = Path(__file__).parent / "faults"
KINDS = frozenset({"onnx-fp32", "train-step", "train-state", "probe"})
_COUNTS = struct.Struct("4q")


class FaultPlace:
    """A broker, a fleet with versions 1 and 2, and the state of a device that serves version 1."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.fleet = folder, port, FakeFleet()
        self.responder = MqttResponder(self.fleet, port)
        self.samples = folder / "samples"
        write_device_samples(self.samples, per_class=12)
        self._versions, self._generation, self._devices = 0, 0, 0
        self.v1, self.v2 = self.publish(), self.publish()
        self._template = AgentProgram(folder / "template", port, self.fleet)
        self._template.configure(runtime="onnxruntime")
        self.want(self.v1)
        code, report = self._template.once()
        assert (code, report["lines"][LINE]["phase"]) == (0, "active"), report

    def publish(self, budget: Budget | None = None, **files: bytes) -> Manifest:
        """Sign and offer the next version: the float32 ONNX file and its train step; ``files`` replace by kind."""
        self._versions += 1
        folder = self.folder / f"bundle-{self._versions}"
        made = make_bundle(folder, version=self._versions, seed=self._versions, budget=budget)
        kept = [replaced(folder, entry, files) for entry in made.artifacts if entry.kind in KINDS | files.keys()]
        manifest = msgspec.structs.replace(made, artifacts=tuple(kept))
        self.fleet.publish(folder, manifest)
        return manifest

    def want(self, manifest: Manifest) -> None:
        """Tell every device that this version is wanted."""
        self._generation += 1
        target = f"lines/{LINE}/{manifest.version}.json"
        self.responder.want("cam-1", Desired(self._generation, {LINE: LineDesired(target)}))

    def device(self, like: FaultyDevice | None = None, **line: Any) -> FaultyDevice:
        """A new device that serves version 1, or what the device ``like`` serves."""
        self._devices += 1
        state = self.folder / f"device-{self._devices}"
        program = AgentProgram(state, self.port, self.fleet)
        shutil.copytree((like.program if like else self._template).state, state, symlinks=True, dirs_exist_ok=True)
        program.configure(**{"runtime": "onnxruntime", **line})
        return FaultyDevice(program, self)


def replaced(folder: Path, entry, files: Mapping[str, bytes]):
    """The manifest's entry for a file that becomes ``files[kind]``, where that is given."""
    from kiridashi.artifacts import describe_file

    kind = entry.kind.replace("-", "_")
    if kind not in files:
        return entry
    (folder / entry.name).write_bytes(files[kind])
    told = describe_file(folder / entry.name, entry.kind)
    return msgspec.structs.replace(entry, bytes=told.bytes, sha256=told.sha256, chunks=told.chunks, patches=())


@dataclass
class FaultyDevice:
    """One device's state folder, its agent, and what is wrong with them."""

    program: AgentProgram
    place: FaultPlace
    faults: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    inside: SmallDevice | None = None

    @property
    def state(self) -> Path:
        return self.program.state

    @property
    def line_folder(self) -> Path:
        return self.state / "lines" / LINE

    def once(self, timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
        """``run --once``; the exit code, and the line's state (or the error)."""
        process = self.start("--once", "--timeout", str(timeout_s))
        out, err = process.communicate(timeout=timeout_s + 60)
        if process.returncode < 0:
            return process.returncode, {"log": err}
        assert out, err
        answer = json.loads(out)
        return process.returncode, {**answer.get("lines", {}).get(LINE, answer), "log": err}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The agent in the background, with the faults."""
        with injected(self):
            if self.inside is None:
                return self.program.start(*arguments)
            small = self.inside.program(self.place.folder, Path(sys.executable))
            return self.program.start(*arguments, python=small)

    def files(self) -> list[str]:
        """Every file and folder of the state, but for locks."""
        found = (path for path in self.state.rglob("*") if path.suffix != ".lock" and path.name != ".lock")
        return sorted(str(path.relative_to(self.state)) for path in found)

    def bytes(self) -> int:
        """What the state takes on the disk, as file sizes."""
        return sum(path.stat().st_size for path in self.state.rglob("*") if path.is_file())

    def digest(self) -> str:
        """What a line that starts now would serve."""
        with LineModel.open(LINE, self.state) as model:
            return model.active.model_digest


@contextmanager
def injected(device: FaultyDevice) -> Iterator[None]:
    """The environment in which an agent with the device's faults is started."""
    folder = device.place.folder / f"{device.state.name}-faults"
    folder.mkdir(exist_ok=True)
    shutil.copy(ASSETS / "sitecustomize.py", folder)
    (folder / "faults.json").write_text(json.dumps(device.faults))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    before = dict(os.environ)
    os.environ.update(device.environment, PYTHONPATH=path)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def fault_place(folder: Path) -> Iterator[FaultPlace]:
    """A place with its own broker on a free port."""
    port = free_port()
    with mosquitto(folder, port):
        place = FaultPlace(folder, port)
        try:
            yield place
        finally:
            place.responder.close()


@dataclass
class WatchedLine:
    """A line process in a thread: predicts all the time and notes which model answered."""

    digests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    predictions: int = 0


@contextmanager
def line_working(state: Path) -> Iterator[WatchedLine]:
    """A line that predicts every 5 ms from before the block to after it; every answer is compared with the model's own.

    At the end: it never failed, and never served anything but whole models in the order in which they were activated.
    """
    frames, _ = device_tiles(2, seed=3)
    seen, stop, answers = WatchedLine(), threading.Event(), {}

    def work(model: LineModel) -> None:
        while not stop.wait(0.005):
            try:
                prediction = model.predict(frames)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test has to show it
                seen.errors.append(repr(error))
                return
            seen.predictions += 1
            digest = prediction.model_digest
            if digest not in answers:
                answers[digest] = prediction.values
                seen.digests.append(digest)
            if not np.array_equal(answers[digest], prediction.values):
                seen.errors.append(f"{digest} answers differently now")

    with LineModel.open(LINE, state) as model:
        thread = threading.Thread(target=work, args=(model,))
        thread.start()
        try:
            yield seen
            time.sleep(0.3)  # longer than the pause between two looks at the pointer
        finally:
            stop.set()
            thread.join()
    assert seen.errors == []
    assert seen.predictions > 5


def preloaded(folder: Path, name: str) -> Path:
    """The library of a C file in ``faults``, for ``LD_PRELOAD``.

    Raises:
        pytest.skip: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip(f"no C compiler here: the library {name} that is put under the agent cannot be built")
    library = folder / f"{name}.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(ASSETS / f"{name}.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


class DiskFaults:
    """The preloaded library: counts an agent's changes of its state folder, and at a count fails or kills."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.library = folder, preloaded(folder, "disk_faults")

    def arm(self, device: FaultyDevice, at: int, *, kills: bool) -> Path:
        """From the next start of the agent on, its change number ``at`` does not happen (0: all do). The log's path."""
        counts, log = self._folder / f"{device.state.name}.counts", self._folder / f"{device.state.name}.log"
        counts.write_bytes(_COUNTS.pack(0, at, int(kills), 0))
        log.write_text("")
        settings = {
            "LD_PRELOAD": str(self.library),
            "DISK_FAULTS_ROOT": f"{device.state}/",
            "DISK_FAULTS_STATE": str(counts),
            "DISK_FAULTS_LOG": str(log),
        }
        wrapper = self._folder / f"{device.state.name}.python"
        exports = "\n".join(f"export {name}='{value}'" for name, value in settings.items())
        wrapper.write_text(f'#!/bin/sh\n{exports}\nexec "{sys.executable}" "$@"\n')
        wrapper.chmod(0o755)
        device.environment.update(settings)
        device.faults["python"] = str(wrapper)
        return log

    def disarm(self, device: FaultyDevice) -> None:
        """The disk is well again."""
        device.environment.clear()
        device.faults.clear()
