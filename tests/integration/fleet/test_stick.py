"""A stick that the plant server writes, taken by a device that was never connected: through the commands."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from agent_program import BINARY
from kiridashi.artifacts import read_bundle
from kiridashi.errors import InputError, StateError
from kiridashi.slots import LineSlots
from kiridashi_agent.identity import create_request, install_ticket
from kiridashi_server.fleet.server import PlantServer
from tiny_bundle import make_bundle

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def plant(tmp_path):
    server = PlantServer.init(tmp_path / "plant")
    server.add_line("press-3")
    for version in (1, 2):
        make_bundle(tmp_path / f"bundle-{version}", version=version, seed=version)
        server.publish(tmp_path / f"bundle-{version}", "press-3")
    yield server
    server.close()


@pytest.fixture
def state(plant, tmp_path):
    """An enrolled device that no network reaches: its broker's port is closed."""
    folder = tmp_path / "device"
    install_ticket(plant.enrol(create_request("cam-1", folder), ["press-3"]), folder, datetime.now(UTC))
    return folder


def take(stick, state, expected: int = 0):
    command = [*BINARY, "import", str(stick), "--state", str(state), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expected, (done.stdout, done.stderr)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["stick", "stick.tar"])
def test_a_device_without_a_network_takes_the_newest_version(plant, state, tmp_path, name) -> None:
    index = plant.export_stick("press-3", tmp_path / name)
    assert index.target == "lines/press-3/2.json"
    found = take(tmp_path / name, state)
    assert (found["phase"], found["version"], found["changed"]) == ("active", 2, True)
    assert LineSlots(state, "press-3").active() is not None
    assert take(tmp_path / name, state)["changed"] is False


def test_the_next_version_and_back_by_undo_only(plant, state, tmp_path) -> None:
    for version in (1, 2):
        plant.export_stick("press-3", tmp_path / f"stick-{version}", version=version)
        assert take(tmp_path / f"stick-{version}", state)["version"] == version
    plant.export_stick("press-3", tmp_path / "old-one", version=1)
    error = take(tmp_path / "old-one", state, expected=31)["error"]
    assert "an import never goes back" in error["why"]


def test_a_device_that_saw_the_stick_takes_the_next_update_of_the_network(plant, state, tmp_path) -> None:
    plant.export_stick("press-3", tmp_path / "stick")
    carried = json.loads((tmp_path / "stick" / "metadata" / "timestamp.json").read_text())["signed"]
    kept = json.loads((plant.folder / "repository" / "metadata" / "timestamp.json").read_text())["signed"]
    assert kept["version"] == carried["version"] + 1
    assert kept["expires"] < carried["expires"]  # the long life is the stick's alone
    assert plant.repository.published.committed()


def test_a_stick_says_until_when_it_holds(plant, tmp_path) -> None:
    index = plant.export_stick("press-3", tmp_path / "stick", life=timedelta(days=7))
    until = datetime.fromisoformat(index.valid_until)
    assert timedelta(days=6, hours=23) < until - NOW < timedelta(days=7, hours=1)


def test_a_line_s_signature_that_would_end_on_the_way_is_renewed(tmp_path) -> None:
    long_ago = NOW - timedelta(days=350)
    old = PlantServer.init(tmp_path / "plant", now=lambda: long_ago)
    old.add_line("press-3")
    make_bundle(tmp_path / "bundle", version=1)
    old.publish(tmp_path / "bundle", "press-3")
    old.close()
    plant = PlantServer.open(tmp_path / "plant")
    index = plant.export_stick("press-3", tmp_path / "stick")
    plant.close()
    assert datetime.fromisoformat(index.valid_until) - NOW > timedelta(days=29)


def test_what_cannot_be_written_is_refused_before_anything_is_signed(plant, tmp_path) -> None:
    timestamp = plant.folder / "repository" / "metadata" / "timestamp.json"
    before = timestamp.read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for out, line, options in (
        (tmp_path / "full", "press-3", {}),
        (tmp_path / "full" / "x", "press-3", {}),
        (tmp_path / "a", "press-3", {"life": timedelta(days=31)}),
        (tmp_path / "b", "press-3", {"life": timedelta(0)}),
        (tmp_path / "c", "press-3", {"version": 3}),
        (tmp_path / "d", "press-9", {}),
    ):
        with pytest.raises(InputError):
            plant.export_stick(line, out, **options)
    lost = read_bundle(tmp_path / "bundle-2").artifact("model.onnx").sha256
    plant.store.path(lost).unlink()
    with pytest.raises(StateError, match="store lacks"):
        plant.export_stick("press-3", tmp_path / "e")
    assert timestamp.read_bytes() == before
    assert not any((tmp_path / name).exists() for name in "abcde")


@pytest.mark.parametrize("name", ["stick", "stick.tar"])
def test_the_index_is_on_the_disk_after_everything_else(plant, tmp_path, monkeypatch, name) -> None:
    synced, sync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    plant.export_stick("press-3", tmp_path / name)
    if name == "stick.tar":
        assert synced[-2:] == [tmp_path / "stick.tar.part", tmp_path]
        return
    files = [path for path in (tmp_path / name).glob("blobs/*") if path.is_file()]
    assert files
    assert set(files) <= set(synced[: -len(list((tmp_path / name).iterdir()))])


def test_an_archive_that_does_not_fit_leaves_nothing(plant, tmp_path, monkeypatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(InputError, match="cannot be written"):
        plant.export_stick("press-3", tmp_path / "stick.tar")
    assert not list(tmp_path.glob("stick*"))
