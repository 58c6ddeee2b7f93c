"""The agent's whole life inside 256 MiB and half a processor, as a kernel limit around every command of the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from control_groups import SmallDevice, small_device
from installed import AGENT, Device, Plant, write_frames
from kiridashi.budget import MIB
from kiridashi_server.quickstart.delivery import write_local_samples
from real_bundle import as_version, make_real_bundle
from tiny_bundle import make_bundle, write_device_samples

LINE = "press-3"
LIMIT = 256 * MIB


@pytest.fixture
def small() -> Iterator[SmallDevice]:
    with small_device(LIMIT, processors=0.5) as limits:
        yield limits


@dataclass
class Peaks:
    """The most memory of each stage of a device's life."""

    small: SmallDevice
    bytes: dict[str, int] = field(default_factory=dict)

    def stage(self, name: str) -> None:
        self.bytes[name] = self.small.take_peak_bytes()

    def conclude(self, capsys: pytest.CaptureFixture[str], tuned: dict[str, Any]) -> None:
        """Print them, and check that nothing came near the limit; the group's own figures count the page cache too."""
        assert self.small.oom_kills() == 0
        measured, tuning = tuned["measured"]["memory_bytes"], tuned["tune"]["peak_rss_bytes"]
        children = {"measured child": measured, "tuning child": tuning}
        with capsys.disabled():
            for name, size in {**self.bytes, **children}.items():
                print(f"\n  {name}: peak {size / MIB:.0f} MiB", end="")
            print()
        assert all(size < LIMIT for size in children.values())


def test_the_whole_life_in_256_mib_and_half_a_processor(plant: Plant, small: SmallDevice, capsys) -> None:
    peaks = Peaks(small)
    stage = peaks.stage
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
    peaks.conclude(capsys, second)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_network_lives_there_too(plant: Plant, small: SmallDevice, capsys) -> None:
    """Half of EfficientNet-Lite0 at 64 pixels: verified, measured, tuned before it goes live, again by hand, undone."""
    bundle, task = make_real_bundle(plant.folder / "real", LINE)
    write_local_samples(task, plant.folder / "samples")
    peaks = Peaks(small)
    device: Device = plant.enrol(agent=small.program(plant.folder, AGENT))
    with plant.serving():
        plant.publish(bundle)
        code, first = device.once(timeout_s=600)
        assert (code, first["phase"], first["tuned"]) == (0, "active", False), first
        peaks.stage("verify, probe, measure, activate")
        device.tune_on(plant.folder / "samples")
        plant.publish(as_version(bundle, 2)[0])
        code, second = device.once(timeout_s=900)
    assert (code, second["phase"], second["tuned"]) == (0, "active", True), second
    peaks.stage("the same with tuning")
    code, tuned = device.run("tune", "--line", LINE, timeout_s=900)
    assert code == 0, tuned
    peaks.stage("tune again")
    device.succeed("undo", "--line", LINE, "--to", "untuned")
    peaks.stage("undo")
    report = second["tune"]
    with capsys.disabled():
        print(f"\n  {second['artifact']}: {report['accuracy_before']:.1%} to {report['accuracy_after']:.1%}", end="")
        print(f" by '{report['variant']}', stale: {report['stale_reasons']}", end="")
    assert report["variant"] in ("last-blocks", "all")
    assert report["accuracy_after"] > report["accuracy_before"]
    assert tuned["report"]["holdout"] == report["holdout"]
    peaks.conclude(capsys, second)
