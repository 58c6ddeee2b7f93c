"""Profiles from the request to the kept report: a plant server, a real broker, and the agent's program.

Only the measuring itself is played.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from zlib import crc32

import msgspec
import profiling_agent
import pytest
from agent_program import wait_for
from fake_profile import DEVICE_CLASS, make_probes, report_of
from kiridashi.messages import LineState, ProbesState, Reported, Request, device_topic, encode, probes_path
from kiridashi.probes import MAX_GRAPHS
from kiridashi_agent.identity import create_request, install_ticket
from kiridashi_agent.journal import Journal
from kiridashi_server.fleet.server import PlantServer
from tiny_bundle import make_bundle


class Agent:
    """An enrolled device, and its agent as processes over one state folder."""

    def __init__(self, plant: PlantServer, state: Path, name: str, line: str) -> None:
        self.state, self.name = state, name
        ticket = plant.enrol(create_request(name, state), [line], replace=True)
        install_ticket(ticket, state, datetime.now(UTC))
        (state / "config.toml").open("a").write("\n[limits]\nretry_wait_s = 0.3\nrequest_timeout_s = 2.0\n")
        self.journal = Journal(state / "journal")

    def phase(self) -> str:
        record = self.journal.profile()
        return record.state.phase if record else ""

    def line_phase(self, line: str) -> str:
        return self.journal.line(line).state.phase

    def measured(self) -> list[str]:
        records = list((self.state / "probes").glob("*/record.json"))
        return msgspec.json.decode(records[0].read_bytes()) if records else []

    @contextlib.contextmanager
    def running(self, pause_s: float = 0.0) -> Iterator[subprocess.Popen]:
        process = subprocess.Popen(
            [sys.executable, profiling_agent.__file__, str(pause_s), str(self.state)],
            stdout=subprocess.PIPE,
            stderr=(self.state / "log").open("a"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def once(self, pause_s: float = 0.0) -> dict:
        with self.running_once(pause_s) as process:
            out, _ = process.communicate(timeout=90)
        return json.loads(out)

    def running_once(self, pause_s: float) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, profiling_agent.__file__, str(pause_s), str(self.state), "--once", "--timeout", "60"],
            stdout=subprocess.PIPE,
            stderr=(self.state / "log").open("a"),
        )


@pytest.fixture
def agent(plant, broker, tmp_path, request) -> Agent:
    return Agent(plant, tmp_path / "device", f"cam-{crc32(request.node.name.encode())}", "press-3")


@pytest.fixture
def published(plant, tmp_path, request):
    """A probe set of four graphs that no other test publishes."""
    probes = make_probes(tmp_path / "probes", graphs=4, name=f"set-{crc32(request.node.name.encode())}")
    plant.publish_probes(tmp_path / "probes")
    return probes


def profile_of(plant: PlantServer, probes) -> object | None:
    return next((entry for entry in plant.profiles() if entry.report.probes == probes.digest), None)


def test_from_the_request_to_the_kept_report(plant, agent, published):
    assert plant.request_profile([agent.name], probes=published.name, seconds=90.0, threads=2) == 1
    assert plant.request_profile([agent.name], probes=published.digest[:12], seconds=90.0, threads=2) == 0
    with plant.serving():
        report = agent.once()
        assert report["probes"]["phase"] == "sent", (agent.state / "log").read_text()
        profile = wait_for(lambda: profile_of(plant, published))
        # The server is told by the device, the device by the server: nothing more is wanted.
        assert plant.registry.desired(agent.name).probes is None
        said = wait_for(lambda: (r := plant.registry.device(agent.name).reported) and r.probes and r)
        assert said.probes.phase in ("sending", "sent")
    assert (profile.device, profile.device_class, profile.runtime) == (agent.name, DEVICE_CLASS, "onnxruntime")
    assert (profile.threads, profile.backbone_fingerprint) == (2, published.backbone_fingerprint)
    assert profile.report == report_of(published, threads=2)
    assert plant.profiles(DEVICE_CLASS) == plant.profiles()
    assert plant.profiles("another class") == ()
    assert plant.probe_set(published.digest) == published
    kinds = [event.kind for event in plant.registry.events(agent.name)]
    assert {"profile-wanted", "profile-measuring", "profiled"} <= set(kinds)
    assert not list((agent.state / "probes").rglob("*.onnx"))


def test_an_agent_killed_while_measuring_goes_on_where_it_was(plant, agent, published):
    plant.request_profile([agent.name], probes=published.name)
    with plant.serving():
        with agent.running(pause_s=0.5) as process:
            wait_for(lambda: len(agent.measured()) == 2)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert (agent.phase(), agent.journal.profile().attempts) == ("measuring", 1)
        assert agent.once()["probes"]["phase"] == "sent"
        assert wait_for(lambda: profile_of(plant, published)).report.complete


def test_a_server_that_is_away_gets_the_report_when_it_is_back(plant, agent, published):
    plant.request_profile([agent.name], probes=published.name)
    with agent.running(pause_s=0.3):
        with plant.serving():
            wait_for(lambda: agent.phase() == "measuring")
        wait_for(lambda: agent.phase() == "sending")
        assert profile_of(plant, published) is None
        again = PlantServer.open(plant.folder)
        with again.serving():
            wait_for(lambda: agent.phase() == "sent")
            assert profile_of(again, published).report.complete
        again.close()


def test_a_new_version_goes_first(plant, agent, published, tmp_path):
    line = "press-3"
    plant.request_profile([agent.name], probes=published.name)
    with plant.serving(), agent.running(pause_s=1.5):
        wait_for(lambda: len(agent.measured()) == 1)
        make_bundle(tmp_path / "bundle", version=1, seed=1)
        plant.publish(tmp_path / "bundle", line)
        plant.set_desired(line, devices=[agent.name])
        wait_for(lambda: agent.line_phase(line) == "active", timeout_s=60)
        assert agent.phase() == "measuring"
        assert len(agent.measured()) < 4
        before = agent.measured()
        wait_for(lambda: agent.phase() == "sent", timeout_s=60)
    events = [event.kind for event in reversed(plant.registry.events(agent.name))]
    assert events.index("active") < events.index("profile-sending")
    assert [timing.name for timing in profile_of(plant, published).report.timings][: len(before)] == before


def test_a_probe_set_that_was_changed_at_the_server_is_refused(plant, agent, published):
    plant.request_profile([agent.name], probes=published.name)
    target = plant.repository.published.targets_folder / f"probes/{published.digest}.{published.digest}.json"
    target.write_bytes(target.read_bytes().replace(b"32", b"64"))
    with plant.serving():
        state = agent.once()["probes"]
        assert (state["phase"], state["error"]["kind"]) == ("failed", "TrustError")
        # The server sees why, and a new request is a new try.
        assert plant.registry.device(agent.name).reported.probes.error.kind == "TrustError"
        target.write_bytes(published.encode())
        assert plant.request_profile([agent.name], probes=published.name) == 1
        assert agent.once()["probes"]["phase"] == "sent"


class TestTheResponder:
    """What the server hands out and takes, asked by a device that is no agent of ours."""

    @pytest.fixture
    def device(self, plant, broker, enrol, published, request):
        name = f"raw-{crc32(request.node.name.encode())}"
        with plant.serving():
            yield enrol(name, "press-3").connect(device_topic(name, "rx"))

    def chunk(self, probes) -> Request:
        return Request("chunk", sha256=probes.graphs[0].artifact.sha256)

    def report(self, number: int, report) -> Request:
        return Request("report", index=number, body=msgspec.Raw(msgspec.json.encode(report)))

    def test_files_are_for_devices_that_are_asked_and_only_until_they_answered(self, plant, device, published):
        target = Request("target", probes_path(published.digest))
        for request in (self.chunk(published), target, Request("metadata", "1.probes.json")):
            assert device.reply(request)[0] == "refused"
        plant.request_profile([device.name], probes=published.name)
        assert device.reply(self.chunk(published)) == (
            "ok",
            plant.store.read_chunk(published.graphs[0].artifact.sha256, 0),
        )
        assert device.reply(target) == ("ok", published.encode())
        number = plant.registry.desired(device.name).probes.request
        assert device.reply(self.report(number, report_of(published))) == ("ok", b"")
        for request in (self.chunk(published), target):
            assert device.reply(request)[0] == "refused"

    def test_a_report_of_as_many_graphs_as_are_allowed_arrives(self, plant, device, tmp_path):
        large = make_probes(tmp_path / "large", graphs=MAX_GRAPHS, size=50, name=f"large-{device.name}")
        plant.publish_probes(tmp_path / "large")
        plant.request_profile([device.name], probes=large.name)
        number = plant.registry.desired(device.name).probes.request
        assert device.reply(self.report(number, report_of(large))) == ("ok", b"")
        assert profile_of(plant, large).report == report_of(large)

    def test_a_report_that_comes_twice_is_acknowledged_twice_and_kept_once(self, plant, device, published):
        plant.request_profile([device.name], probes=published.name)
        number = plant.registry.desired(device.name).probes.request
        generation = plant.registry.device(device.name).generation
        for _ in range(2):
            assert device.reply(self.report(number, report_of(published))) == ("ok", b"")
        assert plant.registry.device(device.name).generation == generation + 1
        kinds = [event.kind for event in plant.registry.events(device.name)]
        assert kinds.count("profiled") == 1

    def test_what_was_not_asked_for_is_refused_with_the_reason(self, plant, device, published, tmp_path):
        report = report_of(published)
        status, text = device.reply(self.report(1, report))
        assert (status, b"was not asked" in text) == ("refused", True)
        plant.request_profile([device.name], probes=published.name)
        number = plant.registry.desired(device.name).probes.request
        replace = msgspec.structs.replace
        other = make_probes(tmp_path / "other", graphs=1, name="never-published")
        for bad, why in (
            (self.report(number + 1, report), b"was not asked"),
            (self.report(number, report_of(other)), b"another probe set"),
            (self.report(number, replace(report, seconds=-1.0)), b"seconds"),
            (Request("report", index=number), b"no report"),
        ):
            status, text = device.reply(bad)
            assert (status, why in text) == ("refused", True), text
        assert profile_of(plant, published) is None


def test_nobody_is_asked_when_one_cannot_be(plant, broker, enrol, published):
    device = enrol("cam-whole", "weld-1")
    for devices, line, words in (
        (["cam-whole", "cam-absent"], None, {}),
        ([], None, {}),
        ([], "paint-9", {}),
        (["cam-whole"], None, {"probes": "never-published"}),
        (["cam-whole"], None, {"seconds": 1e9}),
        (["cam-whole"], None, {"threads": 0}),
    ):
        with pytest.raises(Exception, match=r"refused|no device|no probe set"):
            plant.request_profile(devices, line=line, **{"probes": published.name, **words})
    assert plant.registry.desired(device.name).probes is None
    assert plant.request_profile(line="weld-1", probes=published.name) == len(
        [entry for entry in plant.registry.devices() if "weld-1" in entry.lines]
    )
    wanted = plant.registry.desired(device.name).probes
    assert wanted.target == probes_path(published.digest)


def test_a_request_is_renewed_after_a_failure_and_numbers_only_grow(plant, broker, enrol, published):
    device = enrol("cam-again", "weld-1")

    def number() -> int:
        return plant.registry.desired(device.name).probes.request

    assert plant.request_profile([device.name], probes=published.name) == 1
    first = number()
    failed = ProbesState(probes_path(published.digest), first, "failed")
    report = Reported(device.name, 1, {"weld-1": LineState("idle")}, "0.1.0", probes=failed)
    plant.registry.record_report(report, datetime.now(UTC))
    assert plant.request_profile([device.name], probes=published.name) == 1
    assert number() == first + 1
    # A device that has seen more than this database (it came from a backup) is believed.
    seen = msgspec.structs.replace(report, probes=msgspec.structs.replace(failed, request=40))
    plant.registry.record_report(seen, datetime.now(UTC))
    assert plant.request_profile([device.name], probes=published.name, threads=2) == 1
    assert number() == 41
    assert len(encode(plant.registry.desired(device.name))) < 1000


class TestHistory:
    @pytest.fixture
    def keep(self, plant, broker, enrol, published) -> Callable[..., None]:
        """Puts a report of some graphs on record, as if a device had sent it."""
        device = enrol("cam-history", "weld-1")

        def keep(device_class: str, names: list[str] | None = None, seconds: float = 1.0) -> None:
            plant.request_profile([device.name], probes=published.name, seconds=float(60 + keep.calls))
            keep.calls += 1
            report = msgspec.structs.replace(report_of(published, names), device_class=device_class, seconds=seconds)
            request = plant.registry.profiles.request_of(device.name)
            plant.registry.profiles.add(request, report, "onnxruntime", "f" * 64, datetime.now(UTC))

        keep.calls = 0
        return keep

    def test_the_newest_complete_one_of_a_class_counts(self, plant, keep):
        keep("board h1", ["probe-000.onnx"], seconds=1.0)
        assert [profile.report.seconds for profile in plant.profiles("board h1")] == [1.0]
        keep("board h1", seconds=2.0)
        keep("board h1", seconds=3.0)
        keep("board h1", ["probe-000.onnx"], seconds=4.0)
        keep("board h2", seconds=5.0)
        assert [profile.report.seconds for profile in plant.profiles("board h1")] == [3.0]
        assert [profile.report.seconds for profile in plant.profiles("board h2")] == [5.0]

    def test_the_history_is_bounded(self, plant, keep, monkeypatch):
        monkeypatch.setattr("kiridashi_server.fleet.profiles.PROFILES_KEPT", 3)
        for seconds in range(1, 6):
            keep("board h3", seconds=float(seconds))
        keep("board h3", ["probe-000.onnx"], seconds=6.0)
        (profile,) = plant.profiles("board h3")
        assert profile.report.seconds == 5.0
        with contextlib.closing(sqlite3.connect(plant.folder / "registry.sqlite")) as db:
            kept = db.execute("select report from profile where device_class = 'board h3' order by id").fetchall()
        assert [json.loads(row[0])["seconds"] for row in kept] == [3.0, 4.0, 5.0]

    def test_sets_of_other_names_do_not_replace_each_other(self, plant, keep, published, tmp_path, monkeypatch):
        monkeypatch.setattr("kiridashi_server.fleet.profiles.PROFILES_KEPT", 1)
        keep("board h4", seconds=1.0)
        other = make_probes(tmp_path / "larger", graphs=4, name=f"{published.name}-224")
        plant.publish_probes(tmp_path / "larger")
        plant.request_profile(["cam-history"], probes=other.name)
        request = plant.registry.profiles.request_of("cam-history")
        report = msgspec.structs.replace(report_of(other), device_class="board h4", seconds=2.0)
        plant.registry.profiles.add(request, report, "onnxruntime", "f" * 64, datetime.now(UTC))
        kept = [(profile.probe_set, profile.report.seconds) for profile in plant.profiles("board h4")]
        assert kept == [(published.name, 1.0), (other.name, 2.0)]
