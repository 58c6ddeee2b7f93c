"""The agent's whole life inside 256 MiB and half a processor, as a kernel limit around every command of the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from control_groups import SmallDevice, small_device
from installed import AGENT, Device, Plant, write_frames
from kiridashi.budget import MIB
from tiny_bundle import make_bundle, write_device_samples

LINE = "press-3"


@pytest.fixture
def small() -> Iterator[SmallDevice]:
    with small_device(256 * MIB, processors=0.5) as limits:
        yield limits


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    plant = Plant(tmp_path)
    plant.run("line", "add", LINE)
    return plant


def test_the_whole_life_in_256_mib_and_half_a_processor(plant: Plant, small: SmallDevice, capsys) -> None:
    peaks: dict[str, int] = {}

    def stage(name: str) -> None:
        peaks[name] = small.take_peak_bytes()

    device: Device = plant.enrol(agent=small.program(plant.folder, AGENT))
    stage("enrol")
    frames, samples = plant.folder / "frames.npy", plant.folder / "samples"
    write_frames(frames)
    write_device_samples(samples, per_class=12)
    with plant.serving():
        make_bundle(plant.folder / "bundle-1", version=1, seed=1)
        plant.publish(plant.folder / "bundle-1")
        code, first = device.once(timeout_s=180)
        assert (code, first["phase"], first["slot"], first["tuned"]) == (0, "active", "a", False), first
        stage("verify, probe, measure, activate")
        device.tune_on(samples)
        make_bundle(plant.folder / "bundle-2", version=2, seed=2)
        plant.publish(plant.folder / "bundle-2")
        code, second = device.once(timeout_s=180)
        assert (code, second["phase"], second["slot"], second["tuned"]) == (0, "active", "b", True), second
        stage("the same with tuning")
    assert device.predict(frames)[0] == second["model_digest"]
    stage("predict")
    device.succeed("undo", "--line", LINE, "--to", "previous")
    assert device.predict(frames)[0] == first["model_digest"]
    stage("undo, predict")
    assert small.oom_kills() == 0
    children = {"measured child": second["measured"]["memory_bytes"], "tuning child": second["tune"]["peak_rss_bytes"]}
    with capsys.disabled():
        for name, size in {**peaks, **children}.items():
            print(f"\n  {name}: peak {size / MIB:.0f} MiB", end="")
        print()
    assert all(size < 256 * MIB for size in children.values())
