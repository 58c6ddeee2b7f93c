"""The whole loop by the installed commands: a plant, a device, two versions of a model, and the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from installed import Device, Plant, write_frames
from tiny_bundle import LABELS, make_bundle, write_device_samples


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    plant = Plant(tmp_path_factory.mktemp("plant"))
    plant.run("line", "add", "press-3")
    with plant.serving():
        yield plant


@pytest.fixture(scope="module")
def device(plant) -> Device:
    device = plant.enrol()
    write_device_samples(plant.folder / "samples", per_class=12)
    device.tune_on(plant.folder / "samples")
    return device


def deliver(plant: Plant, device: Device, version: int) -> tuple[str, dict]:
    """Publish a version and let the device settle; the bundle's digest and the line's state."""
    bundle = plant.folder / f"bundle-{version}"
    manifest = make_bundle(bundle, version=version, seed=version)
    released = plant.publish(bundle)
    assert (released["version"], released["devices_told"]) == (version, 1)
    code, line = device.once()
    assert (code, line["phase"], line["version"]) == (0, "active", version), line
    return manifest.digest, line


def right_share(labels: list[str], truth: list[int]) -> float:
    return float(np.mean([label == LABELS[n] for label, n in zip(labels, truth, strict=True)]))


def test_two_versions_are_delivered_tuned_and_undone(plant, device) -> None:
    frames: Path = plant.folder / "frames.npy"
    truth = write_frames(frames)

    shipped, first = deliver(plant, device, 1)
    assert first["tuned"]
    assert first["tune"]["accuracy_after"] > first["tune"]["accuracy_before"]
    assert first["delivery"]["resumed_chunks"] == 0
    assert first["verdict"]["within"]
    digest, labels = device.predict(frames)
    assert digest == first["model_digest"] != shipped
    assert right_share(labels, truth) > 0.8

    shown = plant.run("fleet", "show", "cam-1")
    assert shown["reported"]["lines"]["press-3"]["model_digest"] == digest
    assert shown["lines"]["press-3"] == {"wanted": 1, "phase": "active", "version": 1, "tuned": True}
    assert shown["reported"]["modules_forbidden_loaded"] == []
    noted = [event["kind"] for event in shown["events"]]
    assert [kind for kind in ("downloading", "measuring", "tuning", "active") if kind not in noted] == []

    _, second = deliver(plant, device, 2)
    assert (second["slot"], second["tuned"]) == ("b", True)
    assert device.predict(frames)[0] == second["model_digest"] != digest

    active = device.succeed("undo", "--line", "press-3", "--to", "previous")["active"]
    assert (active["slot"], active["tuned"], active["model_digest"]) == ("a", True, digest)
    assert device.predict(frames) == (digest, labels)
    active = device.succeed("undo", "--line", "press-3")["active"]
    assert (active["slot"], active["tuned"], active["model_digest"]) == ("a", False, shipped)
    assert device.predict(frames)[0] == shipped

    # What was undone by hand stays undone, and the plant hears of it.
    code, line = device.once()
    assert (code, line["phase"], line["model_digest"]) == (0, "rolled-back", shipped)
    assert plant.run("fleet", "show", "cam-1")["lines"]["press-3"]["phase"] == "rolled-back"
