"""A registry from before profiles: it opens as it is, and can do the new things."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime

import protocol_1_0
import pytest
from fake_profile import report_of
from kiridashi.probes import ProbeSet
from kiridashi_server.fleet.records import ProfileRequest, PublishedProbes
from kiridashi_server.fleet.registry import Registry

SCHEMA = """
CREATE TABLE line (name VARCHAR(63) NOT NULL, created VARCHAR(32) NOT NULL, offered INTEGER, PRIMARY KEY (name));
CREATE TABLE device (
    name VARCHAR(63) NOT NULL, certificate_serial VARCHAR(64) NOT NULL, certificate_key_sha256 VARCHAR(64) NOT NULL,
    seal_public_key_pem TEXT NOT NULL, enrolled VARCHAR(32) NOT NULL, generation BIGINT NOT NULL,
    sent_generation BIGINT NOT NULL, online BOOLEAN, reported TEXT, reported_at VARCHAR(32), PRIMARY KEY (name));
CREATE TABLE release (
    line VARCHAR(63) NOT NULL, version INTEGER NOT NULL, target VARCHAR(160) NOT NULL,
    manifest_digest VARCHAR(71) NOT NULL, published VARCHAR(32) NOT NULL, PRIMARY KEY (line, version),
    FOREIGN KEY(line) REFERENCES line (name), UNIQUE (target));
CREATE TABLE release_blob (
    sha256 VARCHAR(64) NOT NULL, line VARCHAR(63) NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (sha256, line, version), FOREIGN KEY(line) REFERENCES line (name));
CREATE TABLE assignment (
    device VARCHAR(63) NOT NULL, line VARCHAR(63) NOT NULL, wanted INTEGER, PRIMARY KEY (device, line),
    FOREIGN KEY(device) REFERENCES device (name), FOREIGN KEY(line) REFERENCES line (name));
CREATE TABLE event (
    id INTEGER NOT NULL, device VARCHAR(63) NOT NULL, kind VARCHAR(63) NOT NULL, at VARCHAR(32) NOT NULL,
    payload TEXT NOT NULL, PRIMARY KEY (id), FOREIGN KEY(device) REFERENCES device (name));
CREATE INDEX event_by_device ON event (device, id);
INSERT INTO line VALUES ('press-3', '2026-01-01T00:00:00+00:00', 1);
INSERT INTO release VALUES ('press-3', 1, 'lines/press-3/1.json', 'sha256:0', '2026-01-01T00:00:00+00:00');
INSERT INTO release_blob VALUES ('aa', 'press-3', 1);
INSERT INTO assignment VALUES ('cam-1', 'press-3', 1);
"""


@pytest.fixture
def registry(tmp_path):
    path = tmp_path / "registry.sqlite"
    said = protocol_1_0.Reported("cam-1", 3, {"press-3": protocol_1_0.LineState("active")}, "0.1.0")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA)
        row = ("cam-1", "1", "2", "pem", "2026-01-01", 3, 3, 1, protocol_1_0.encode(said).decode(), "2026-01-02")
        db.execute("INSERT INTO device VALUES (?,?,?,?,?,?,?,?,?,?)", row)
        db.commit()
    registry = Registry(f"sqlite:///{path}")
    yield registry
    registry.close()


def test_what_was_there_is_still_there(registry):
    desired = registry.desired("cam-1")
    assert (desired.generation, desired.probes) == (3, None)
    assert desired.lines["press-3"].target == "lines/press-3/1.json"
    assert registry.may_read("cam-1", "aa")
    assert registry.device("cam-1").reported.probes is None
    assert (registry.profiles.profiles(), registry.profiles.requests()) == ((), ())


def test_a_device_from_before_can_be_asked(registry):
    now = datetime.now(UTC)
    probes = ProbeSet(
        name="p",
        backbone="b",
        backbone_fingerprint="f",
        layout_digest="l",
        height=1,
        width=1,
        runtime="onnxruntime",
        graphs=(),
    )
    entry = PublishedProbes(probes.digest, "p", "f", "onnxruntime", 0, 0, "2026-01-03")
    registry.profiles.add_probes(entry, ["bb"])
    assert registry.profiles.ask(["cam-1"], ProfileRequest("", 0, probes.digest, 60.0, 1, "2026-01-03"), now) == 1
    assert registry.desired("cam-1").generation == 4
    assert registry.may_read("cam-1", "bb")
    registry.profiles.add(registry.profiles.request_of("cam-1"), report_of(probes), "onnxruntime", "f", now)
    assert len(registry.profiles.profiles()) == 1
    assert not registry.may_read("cam-1", "bb")


def test_a_registry_from_before_candidates_keeps_its_profiles(tmp_path, registry):
    test_a_device_from_before_can_be_asked(registry)
    before = registry.profiles.profiles()
    with contextlib.closing(sqlite3.connect(tmp_path / "registry.sqlite")) as db:
        db.execute("DROP TABLE candidate")
        db.commit()
    again = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}")
    assert again.profiles.profiles() == before
    assert [profile.probe_set for profile in before] == ["p"]
    entry = PublishedProbes("d" * 64, "candidate-1", "f", "onnxruntime", 1, 1, "2026-01-04")
    again.profiles.add_probes(entry, ["cc"], is_candidate=True)
    assert [one.name for one in again.profiles.probe_sets()] == ["p"]
    again.close()
