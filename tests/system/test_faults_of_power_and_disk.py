"""The agent is killed at every state of its journal and every change on the disk, and the disk is full at every write.

Each time, a line predicts all the while, the device then comes to the wanted version, and nothing is left over: the
state folder holds the same files as after an update that nothing disturbed. By default a sample of the changes is
taken; ``make soak`` takes every one.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest
from agent_program import wait_for
from fault_place import LINE, DiskFaults, FaultPlace, FaultyDevice, line_working
from kiridashi.slots import LineSlots
from kiridashi_agent.journal import Journal
from kiridashi_agent.lifecycle import PHASES, RESTING

STATE_ERROR = 60
SAMPLED = 5
JOURNALED = [phase for phase in PHASES if phase not in RESTING]


@dataclass(frozen=True)
class Undisturbed:
    """What an update that nothing disturbs changes on the disk and leaves there."""

    changes: tuple[str, ...]
    writes: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


@pytest.fixture(scope="module")
def wanted(faults: FaultPlace) -> FaultPlace:
    """The place, whose server wants version 2."""
    faults.want(faults.v2)
    return faults


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> DiskFaults:
    return DiskFaults(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def undisturbed(wanted: FaultPlace, disk: DiskFaults) -> Undisturbed:
    device = tuning_device(wanted)
    log = disk.arm(device, 0, kills=True)
    assert device.once()[1]["tuned"]
    changes = tuple(log.read_text().splitlines())
    writes = tuple(line for line in changes if line.split()[1] not in ("rename", "unlink", "rmdir"))
    return Undisturbed(changes, writes, tuple(device.files()), device.bytes())


def tuning_device(place: FaultPlace) -> FaultyDevice:
    return place.device(samples=place.samples)


def comes_to_version_2(device: FaultyDevice, undisturbed: Undisturbed) -> None:
    """The next start ends as if nothing had happened, and leaves nothing else."""
    device.faults.clear()
    code, line = device.once()
    assert code == 0, line
    assert (line["phase"], line["version"], line["slot"], line["error"]) == ("active", 2, "b", None), line
    assert line["tuned"]
    assert device.digest() == line["model_digest"]
    assert tuple(device.files()) == undisturbed.files
    assert abs(device.bytes() - undisturbed.bytes) < 4096


@pytest.mark.parametrize("phase", JOURNALED)
def test_killed_in_every_state_of_the_journal(wanted, undisturbed, phase) -> None:
    device = tuning_device(wanted)
    with line_working(device.state) as line:
        device.faults["kill_phase"] = phase
        assert device.once()[0] == -signal.SIGKILL
        assert Journal(device.state / "journal").line(LINE).state.phase == phase
        assert LineSlots(device.state, LINE).active().slot == "a"
        assert device.program.call("status")[1]["lines"][LINE]["state"]["phase"] == phase
        assert device.digest() == wanted.v1.digest
        assert line.digests == [wanted.v1.digest]
        comes_to_version_2(device, undisturbed)
    assert line.digests == [wanted.v1.digest, device.digest()]


def killed_at(place: FaultPlace, disk: DiskFaults, undisturbed: Undisturbed, number: int) -> None:
    device = tuning_device(place)
    disk.arm(device, number, kills=True)
    with line_working(device.state) as line:
        code, told = device.once()
        assert code == -signal.SIGKILL, told
        disk.disarm(device)
        device.digest()  # a line that starts now finds a whole model
        comes_to_version_2(device, undisturbed)
    assert line.digests == [place.v1.digest, device.digest()]


def full_from(place: FaultPlace, disk: DiskFaults, undisturbed: Undisturbed, number: int) -> None:
    device = tuning_device(place)
    disk.arm(device, number, kills=False)
    with line_working(device.state) as line:
        code, told = device.once(timeout_s=4)
        assert (code, told["error"]["kind"]) == (STATE_ERROR, "StateError"), told
        assert "No space left on device" in told["error"]["why"]
        reported = wait_for(lambda: place.responder.states[-1].lines[LINE].error)
        assert "No space left on device" in reported.message
        device.digest()
        disk.disarm(device)
        comes_to_version_2(device, undisturbed)
    assert line.digests == [place.v1.digest, device.digest()]


@pytest.mark.parametrize("part", range(SAMPLED))
def test_killed_at_a_change_on_the_disk(wanted, disk, undisturbed, part) -> None:
    killed_at(wanted, disk, undisturbed, sampled(part, len(undisturbed.changes)))


@pytest.mark.parametrize("part", range(SAMPLED))
def test_a_disk_that_is_full_from_a_write_on(wanted, disk, undisturbed, part) -> None:
    full_from(wanted, disk, undisturbed, sampled(part, len(undisturbed.writes)))


def sampled(part: int, total: int) -> int:
    """A number from 1 to ``total``, one from each of ``SAMPLED`` equal parts."""
    return min(total, 1 + (2 * part + 1) * total // (2 * SAMPLED))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", [killed_at, full_from])
def test_every_single_change(wanted, disk, undisturbed, fault) -> None:
    changes = undisturbed.changes if fault is killed_at else undisturbed.writes
    failed = {}
    for number, change in enumerate(changes, start=1):
        try:
            fault(wanted, disk, undisturbed, number)
        except AssertionError as error:
            failed[f"{number}: {change}"] = str(error)
    assert failed == {}
