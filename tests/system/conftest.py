"""A plant and a device of a test's own; for the tests of faults one device that serves, of which each gets a copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_place import FaultPlace, fault_place
from installed import Device, Plant, deliver


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultPlace]:
    with fault_place(tmp_path_factory.mktemp("faults")) as place:
        yield place


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Knows one line; its server is down."""
    plant = Plant(tmp_path)
    plant.run("line", "add", "press-3")
    return plant


@pytest.fixture
def device(plant: Plant) -> Device:
    """Serves version 1 untuned; the plant's server is down again."""
    device = plant.enrol()
    assert deliver(plant, device, 1)["slot"] == "a"
    return device
