"""A device, a fleet, and two versions of a bundle."""

from __future__ import annotations

import pytest
from fake_device import Device
from fake_fleet import FakeFleet
from tiny_bundle import make_bundle


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Versions 1 and 2 of a bundle; 2 has other weights."""
    made = {}
    for version in (1, 2):
        folder = tmp_path_factory.mktemp(f"bundle-{version}")
        made[version] = (folder, make_bundle(folder, version=version, seed=version))
    return made


@pytest.fixture
def fleet(bundles) -> FakeFleet:
    fleet = FakeFleet()
    for folder, manifest in bundles.values():
        fleet.publish(folder, manifest)
    return fleet


@pytest.fixture
def device(tmp_path, fleet) -> Device:
    return Device(tmp_path / "state", fleet)


@pytest.fixture
def serving(device) -> Device:
    """The device with version 1 active."""
    device.transport.want(1, press_3="lines/press-3/1.json")
    assert device.settle().phase == "active"
    device.jobs.calls.clear()
    device.fleet.requests.clear()
    return device
