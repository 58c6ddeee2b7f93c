from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from kiridashi.manifest import Manifest
from kiridashi.slots import Active, LineSlots

from tests.assets.tiny_bundle import make_bundle, write_device_samples


@dataclass(frozen=True)
class Device:
    """A state folder with the tiny bundle active in slot a, and local samples."""

    state_dir: Path
    slots: LineSlots
    manifest: Manifest
    samples: Path


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, made once; tests copy it."""
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    make_bundle(folder)
    return folder


@pytest.fixture
def bundle(shipped: Path, tmp_path: Path) -> Path:
    """A bundle folder of the test's own."""
    return Path(shutil.copytree(shipped, tmp_path / "bundle"))


@pytest.fixture
def device(shipped: Path, tmp_path: Path) -> Device:
    slots = LineSlots(tmp_path / "state", "press-3")
    manifest = install(slots, "a", shipped)
    slots.activate(Active(slot="a", artifact="model.onnx", model_digest=manifest.digest))
    write_device_samples(tmp_path / "samples")
    return Device(tmp_path / "state", slots, manifest, tmp_path / "samples")


def install(slots: LineSlots, slot: str, shipped: Path) -> Manifest:
    """Put the shipped bundle into a slot that is not active."""
    from kiridashi.artifacts import read_bundle

    shutil.copytree(shipped, slots.prepare(slot), dirs_exist_ok=True)  # type: ignore[arg-type]
    return read_bundle(slots.folder(slot))  # type: ignore[arg-type]
