"""The doctor's checks, one at a time: what they see, and what they tell people to do."""

from __future__ import annotations

import os
import time
from collections import namedtuple
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from fake_fleet import FakeFleet
from kiridashi.budget import MIB
from kiridashi.config import BrokerSection, Config, DeviceSection, LimitsSection, LineSection
from kiridashi.errors import ExitCode
from kiridashi_agent import health
from kiridashi_agent.cli import main

Usage = namedtuple("Usage", "total used free")
NOW = datetime.now(UTC)


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(DeviceSection("cam-1", tmp_path), BrokerSection("localhost"), {"press-3": LineSection()})


def test_permissions_are_those_of_the_account(config, tmp_path) -> None:
    key = tmp_path / "tls" / "key.pem"
    key.parent.mkdir()
    key.touch(mode=0o600)
    assert health.permissions(config).result == "ok"
    key.chmod(0o640)
    found = health.permissions(config)
    assert (found.result, found.code, found.next_step) == ("failed", ExitCode.TRUST, f"chmod 600 {key}; " + LEAKED)


LEAKED = "if others had access, enrol again"


def test_another_account_s_folder_is_named(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    found = health.permissions(config)
    assert (found.result, found.code) == ("failed", ExitCode.STATE)
    assert "sudo -u kiridashi" in found.next_step


def test_a_folder_that_cannot_be_written_is_named(config, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(health.tempfile, "TemporaryFile", refuse)
    found = health.permissions(config)
    assert found.result == "failed"
    assert found.detail.endswith("cannot be written: Read-only file system")


@pytest.mark.parametrize(("kind", "result"), [("ext4", "ok"), ("tmpfs", "warning"), ("overlay", "warning")])
def test_state_that_a_restart_loses_is_warned_of(config, tmp_path, monkeypatch, kind, result) -> None:
    mounts = tmp_path / "mounts"
    rows = ("/dev/a / btrfs ro 0 0", f"/dev/b {tmp_path.resolve()} {kind} rw 0 0", f"/dev/c {tmp_path}x xfs rw 0 0")
    mounts.write_text("\n".join(rows))
    monkeypatch.setattr(health, "_MOUNTS", mounts)
    found = health.storage(config)
    assert found.result == result
    assert (kind if result == "ok" else "restart may lose it") in found.detail


@pytest.mark.parametrize(
    ("free_mib", "keep_mib", "result"),
    [(500, 16, "ok"), (70, 16, "warning"), (15, 16, "failed"), (500, 9000, "failed")],
)
def test_the_disk_has_room_for_a_bundle_and_what_is_kept_free(config, monkeypatch, free_mib, keep_mib, result) -> None:
    monkeypatch.setattr(health.shutil, "disk_usage", lambda _: Usage(1000 * MIB, 0, free_mib * MIB))
    limits = LimitsSection(free_disk_mib=keep_mib)
    found = health.disk(Config(config.device, config.broker, config.lines, limits))
    assert found.result == result
    assert found.next_step or result == "ok"


def test_room_is_measured_by_the_largest_bundle_that_is_here(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(health.shutil, "disk_usage", lambda _: Usage(1000 * MIB, 0, 17 * MIB))
    slot = tmp_path / "lines" / "press-3" / "a"
    slot.mkdir(parents=True)
    (slot / "model.onnx").write_bytes(bytes(MIB // 2))
    assert health.disk(config).result == "ok"
    (slot / "model.tflite").write_bytes(bytes(MIB))
    assert health.disk(config).result == "warning"


@pytest.mark.parametrize(
    ("begin", "end", "result", "words"),
    [
        (-10, 100, "ok", ""),
        (-10, 20, "warning", "enrol again"),
        (-10, -1, "failed", "look at the clock"),
        (365, 999, "failed", "set the clock"),
    ],
)
def test_certificates_and_clock_are_looked_at_together(
    config, tmp_path, monkeypatch, begin, end, result, words
) -> None:
    broker = BrokerSection("b", 8883, tmp_path / "ca.pem", tmp_path / "certificate.pem", tmp_path / "key.pem")
    span = (NOW + timedelta(days=begin), NOW + timedelta(days=end))
    always = (NOW - timedelta(days=10), NOW + timedelta(days=3650))
    monkeypatch.setattr(health, "certificate_validity", lambda file: always if file.name == "ca.pem" else span)
    found = health.certificates(Config(config.device, broker, config.lines))
    assert found.result == result
    assert words in found.next_step


def test_a_clock_behind_the_last_trusted_update_fails(config, tmp_path) -> None:
    assert health.clock(config).result == "ok"
    folder = tmp_path / "trust" / "metadata"
    folder.mkdir(parents=True)
    (folder / "clock-floor").write_text(str(time.time() + 3 * 365 * 86_400))
    found = health.clock(config)
    assert (found.result, found.code) == ("failed", ExitCode.TRUST)
    assert "timedatectl set-time" in found.next_step


def test_signatures_that_have_run_out_are_a_warning_only(config, tmp_path) -> None:
    fleet = FakeFleet()
    folder = tmp_path / "trust" / "metadata"
    folder.mkdir(parents=True)
    (tmp_path / "trust" / "root.json").write_bytes(fleet.root)
    assert "hold until" not in health.root(config).detail
    (folder / "timestamp.json").write_bytes(fleet.metadata["timestamp.json"])
    assert health.root(config).result == "ok"
    assert "hold until" in health.root(config).detail
    fleet.commit(expires=NOW.replace(microsecond=0) - timedelta(days=1))
    (folder / "timestamp.json").write_bytes(fleet.metadata["timestamp.json"])
    found = health.root(config)
    assert (found.result, "import" in found.next_step) == ("warning", True)


def test_offline_the_broker_is_not_asked(config) -> None:
    asked = {check.name for check in health.look_at(config, offline=False)}
    assert asked - {check.name for check in health.look_at(config, offline=True)} == {"broker"}


def test_a_broken_configuration_is_a_check_with_a_next_step(tmp_path, capsys) -> None:
    (tmp_path / "config.toml").write_text('[device]\nid = "cam-1"\n[broker]\nhots = "localhost"\n')
    assert main(["doctor", "--state", str(tmp_path)]) == ExitCode.INPUT
    said = capsys.readouterr().out
    assert "FAILED  config: " in said
    assert "config.toml:4: the key 'broker.hots' is unknown" in said
    assert "next: did you mean 'broker.host'?" in said


def test_pictures_in_class_folders_are_samples_too(config, tmp_path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    config = msgspec.structs.replace(config, lines={"press-3": LineSection(samples=folder)})
    assert health.samples(config).result == "warning"
    (folder / "dent").mkdir()
    assert health.samples(config).result == "ok"


def test_a_file_that_leaves_meanwhile_is_one_failed_check(config) -> None:
    def disk(_config: Config) -> health.Check:
        raise FileNotFoundError(2, "No such file or directory", "a.part")

    found = health.guarded(disk, config)
    assert (found.name, found.result, found.code) == ("disk", "failed", ExitCode.STATE)
