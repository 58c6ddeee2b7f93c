"""Files that rot, a journal that is lost, a clock that jumps by years, a line that floods its spool.

Lines that run keep serving; the agent sees it when it starts, tells the server, and mends what it can.
"""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from agent_program import wait_for
from fault_place import LINE, FaultPlace, FaultyDevice, line_working, preloaded
from kiridashi import LineModel
from kiridashi.errors import KiridashiError
from kiridashi.manifest import Manifest
from kiridashi.messages import LineState
from kiridashi.spool import Spool, SpoolLimits
from tiny_bundle import device_tiles

TEN_YEARS_S = 3650 * 86_400
_OFFSET = struct.Struct("q")


@pytest.fixture(scope="module")
def tuned(faults: FaultPlace) -> FaultyDevice:
    """A device that serves version 2, tuned by itself."""
    faults.want(faults.v2)
    device = faults.device(samples=faults.samples)
    code, line = device.once()
    assert (code, line["tuned"]) == (0, True), line
    return device


@pytest.fixture
def device(faults: FaultPlace, tuned: FaultyDevice) -> FaultyDevice:
    """A copy of that device; the server wants what it serves."""
    faults.want(faults.v2)
    return faults.device(like=tuned, samples=faults.samples)


def flip(path: Path) -> None:
    """One bit of the middle byte is another one; text is no text any more."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(bytes(data))


def mended(device: FaultyDevice, words: str) -> None:
    """The agent starts, tells of what is wrong, and afterwards serves version 2 as before."""
    seen = device.place.responder.seen
    before = len(seen)
    code, line = device.once()
    assert (code, line["phase"], line["version"], line["tuned"]) == (0, "active", 2, True), line
    events = [json.loads(data).get("message", "") for topic, data in seen[before:] if "/evt/" in topic]
    assert any(words in message for message in events), events
    assert device.digest() == line["model_digest"]


@pytest.mark.parametrize("name", ["b/manifest.json", "b/tuned/model.onnx", "b/tuned/seal.json", "active.json"])
def test_a_damaged_file_that_serves(device: FaultyDevice, name: str) -> None:
    before = device.digest()
    with line_working(device.state) as line:
        flip(device.line_folder / name)
        with pytest.raises(KiridashiError) as caught:  # a line that starts now says what is wrong
            device.digest()
        assert str(device.line_folder) in str(caught.value)
        assert LINE in device.program.call("status")[1]["lines"]
        assert line.digests == [before]
        mended(device, "written anew from the journal" if name == "active.json" else "was damaged on the disk")
    assert line.digests[0] == before


def test_a_damaged_file_that_does_not_serve_harms_no_update(faults: FaultPlace, device: FaultyDevice) -> None:
    before = device.digest()
    with line_working(device.state) as line:
        for name in ("model.onnx", "train_step.onnx", "train_state.npz", "probe.npz", "tuned/tuned.npz"):
            flip(device.line_folder / "b" / name)
        faults.want(faults.publish())
        code, told = device.once()
    assert (code, told["phase"], told["slot"], told["tuned"]) == (0, "active", "a", True), told
    assert line.digests == [before, told["model_digest"]]


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "a folder",
        pytest.param("cut off", marks=pytest.mark.slow),
        pytest.param("of another version", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_journal(device: FaultyDevice, damage: str) -> None:
    before, path = device.digest(), device.state / "journal" / f"{LINE}.line.json"
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        (path / "inside").mkdir(parents=True)
    else:
        changed = {"cut off": data[:100], "empty": b"", "of another version": data.replace(b'"active"', b'"flying"')}
        path.write_bytes(changed[damage])
    with line_working(device.state) as line:
        status = device.program.call("status")[1]["lines"][LINE]
        assert "was damaged" in status["state"]["error"]["message"]
        assert status["active"]["model_digest"] == before
        mended(device, "was damaged: set aside as press-3.line.json.damaged")
    assert line.digests[0] == before
    assert path.with_name(path.name + ".damaged").exists()


class Clock:
    """The agent's own clock, which the test sets while the agent runs."""

    def __init__(self, device: FaultyDevice) -> None:
        folder = device.place.folder
        self._file = folder / f"{device.state.name}.clock"
        self._file.write_bytes(_OFFSET.pack(0))
        device.environment |= {"LD_PRELOAD": str(preloaded(folder, "clock_faults")), "CLOCK_FAULTS": str(self._file)}

    def set(self, ahead_s: int) -> None:
        """From now on, the agent's clock is so many seconds ahead of this machine's."""
        with self._file.open("r+b") as file:
            file.write(_OFFSET.pack(ahead_s))


@contextmanager
def running(device: FaultyDevice) -> Iterator[subprocess.Popen[str]]:
    """The agent as a service for the block."""
    process = device.start()
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def reported(place: FaultPlace, manifest: Manifest, phase: str) -> LineState:
    """What the device reports once that version is in that phase."""

    def last() -> LineState | None:
        line = place.responder.states[-1].lines[LINE]
        return line if line.target.endswith(f"/{manifest.version}.json") and line.phase == phase else None

    found: LineState = wait_for(last)
    return found


def test_a_clock_that_jumps_by_years(faults: FaultPlace, device: FaultyDevice) -> None:
    """One agent, never restarted: ten years ahead, ten years back, and right again."""
    clock = Clock(device)
    wanted = faults.publish()
    with line_working(device.state) as line, running(device):
        wait_for(lambda: faults.responder.states[-1].lines[LINE].phase == "active")
        clock.set(TEN_YEARS_S)
        faults.want(wanted)
        error = reported(faults, wanted, "rejected").error
        assert (error.kind, error.phase) == ("TrustError", "fetching")
        assert "expired metadata was refused" in error.message
        clock.set(-TEN_YEARS_S)
        faults.want(wanted)
        wait_for(lambda: "clock went back" in str(faults.responder.states[-1].lines[LINE].error))
        assert len(line.digests) == 1
        clock.set(0)
        faults.want(wanted)
        assert reported(faults, wanted, "active").version == wanted.version
    assert len(line.digests) == 2


def test_a_line_that_floods_its_spool_during_an_update(faults: FaultPlace, device: FaultyDevice) -> None:
    """Thousands of frames a second: predictions keep their time, the disk its bound, and the update its course."""
    frames, _ = device_tiles(8, seed=11)
    limits = SpoolLimits(frames=40, bytes=200_000, filling_s=0.0, full_s=0.0, free_disk_bytes=0)
    spool = Spool.open(LINE, device.state, limits)
    faults.want(faults.publish())
    largest = 0
    with LineModel.open(LINE, device.state) as quiet:
        alone_s = timed(quiet, frames, 2000)
    process = device.start("--once", "--timeout", "60")
    flooding_s: list[float] = []
    with LineModel.open(LINE, device.state, spool=spool) as model:
        while process.poll() is None:
            flooding_s += timed(model, frames, 200)
            largest = max(largest, bytes_in(spool.folder.root))
        counts = spool.counts()
        assert model.swap_error is None
    spool.close()
    out, _ = process.communicate()
    line = json.loads(out)["lines"][LINE]
    assert (line["phase"], line["slot"]) == ("active", "a"), line
    assert counts.offered == len(flooding_s) > 3000
    assert counts.written > 50
    assert (counts.failed, counts.error) == (0, "")
    assert 0 < largest <= limits.bytes + 4 * frames[0].nbytes + 40 * 1024
    assert statistics.median(flooding_s) < statistics.median(alone_s) + 0.0005


def timed(model: LineModel, frames: np.ndarray, times: int) -> list[float]:
    """Seconds of single predictions."""
    took = []
    for number in range(times):
        started = time.perf_counter()
        model.predict(frames[number % len(frames)])
        took.append(time.perf_counter() - started)
    return took


def bytes_in(folder: Path) -> int:
    """The bytes of a folder's files, which others may be removing meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
