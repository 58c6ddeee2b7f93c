"""``kiridashi profile`` as a person types it."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import msgspec
import pytest
from fake_profile import DEVICE_CLASS, make_probes, report_of
from kiridashi.command import main
from kiridashi.messages import ErrorReport, LineState, ProbesState, Reported, probes_path
from kiridashi.probes import decode_probe_report
from kiridashi_server.cli import profile
from kiridashi_server.fleet.connection import BrokerAddress
from kiridashi_server.fleet.profiling import ReportDesk
from kiridashi_server.fleet.server import PlantServer


@pytest.fixture
def server(tmp_path, device_request):
    server = PlantServer.init(tmp_path / "state", BrokerAddress("127.0.0.1", 8883))
    server.add_line("press-3")
    for name in ("cam-1", "cam-2"):
        server.enrol(device_request(name), ["press-3"])
    yield server
    server.close()


@pytest.fixture
def run(server, capsys):
    def call(*words: str) -> tuple[int, dict]:
        code = main("kiridashi", "", profile.COMMANDS, [*words, "--state", str(server.folder), "--json"])
        return int(code), json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def say(server, capsys):
    def call(*words: str) -> str:
        assert main("kiridashi", "", profile.COMMANDS, [*words, "--state", str(server.folder)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def probes(tmp_path):
    return make_probes(tmp_path / "probes", size=1000)


def answer(server: PlantServer, device: str, report) -> None:
    number = server.registry.profiles.request_of(device).number
    desk = ReportDesk(server.registry, server.repository.published, lambda: datetime.now(UTC))
    desk.take_report(device, number, msgspec.json.encode(report))


def test_from_a_probe_set_to_a_report_file(server, run, say, probes, tmp_path):
    assert "next: kiridashi profile publish" in say("profile", "list")
    code, data = run("profile", "publish", str(tmp_path / "probes"))
    assert (code, data["name"], data["graphs"], data["digest"]) == (0, probes.name, 3, probes.digest)
    assert "next: kiridashi profile request" in say("profile", "publish", str(tmp_path / "probes"))
    assert "next: kiridashi profile request" in say("profile", "list")
    assert run("profile", "request", "--line", "press-3", "--seconds", "60") == (0, {"devices_asked": 2})
    assert run("profile", "request", "--device", "cam-1", "--device", "cam-2", "--seconds", "60")[1] == {
        "devices_asked": 0
    }
    assert [row["phase"] for row in run("profile", "list")[1]["requests"]] == ["asked", "asked"]

    old = Reported("cam-1", 1, {"press-3": LineState("idle")}, "0.0.9", protocol="1.0")
    server.registry.record_report(old, datetime.now(UTC))
    assert "cam-1 (tiny-onnxruntime): asked: its agent is too old" in say("profile", "list")
    state = ProbesState(probes_path(probes.digest), 1, "measuring", 1, 3)
    for name, said in (
        ("cam-1", state),
        ("cam-2", msgspec.structs.replace(state, phase="failed", error=ErrorReport("StateError", 60, "no room"))),
    ):
        report = Reported(name, 1, {"press-3": LineState("idle")}, "0.1.0", probes=said)
        server.registry.record_report(report, datetime.now(UTC))
    text = say("profile", "list")
    assert "cam-1 (tiny-onnxruntime): measuring, 1 of 3 steps" in text
    assert "cam-2 (tiny-onnxruntime): failed: no room" in text

    answer(server, "cam-1", report_of(probes))
    data = run("profile", "list")[1]
    assert [row["phase"] for row in data["requests"]] == ["answered", "failed"]
    assert [(row["device_class"], row["complete"], row["graphs"]) for row in data["profiles"]] == [
        (DEVICE_CLASS, True, 3)
    ]
    assert DEVICE_CLASS in say("profile", "list")
    assert "probe-001.onnx: quiet 2 ms, p95 2.6 ms" in say("profile", "show", DEVICE_CLASS)
    output = tmp_path / "report.json"
    code, data = run("profile", "show", DEVICE_CLASS, "-o", str(output))
    assert (code, data["profiles"][0]["report"]["complete"]) == (0, True)
    assert decode_probe_report(output.read_bytes()) == report_of(probes)


def test_a_file_takes_one_profile(server, run, probes, tmp_path):
    run("profile", "publish", str(tmp_path / "probes"))
    for threads in (1, 2):
        run("profile", "request", "--device", "cam-1", "--threads", str(threads))
        answer(server, "cam-1", report_of(probes, threads=threads))
    output = tmp_path / "report.json"
    code, data = run("profile", "show", DEVICE_CLASS, "-o", str(output))
    assert (code, "--threads" in data["error"]["next"], output.exists()) == (10, True, False)
    assert run("profile", "show", DEVICE_CLASS, "--threads", "2", "-o", str(output))[0] == 0
    assert decode_probe_report(output.read_bytes()).threads == 2
    both = run("profile", "show", DEVICE_CLASS, "--backbone", "fff", "--runtime", "onnxruntime")[1]
    assert len(both["profiles"]) == 2


@pytest.mark.parametrize(
    ("words", "code", "next_step"),
    [
        (["publish", "absent"], 30, ""),
        (["request", "--device", "cam-1", "--probes", "absent"], 10, "kiridashi profile publish"),
        (["request", "--device", "cam-9"], 10, "kiridashi fleet list"),
        (["request", "--line", "paint-9"], 10, "kiridashi line list"),
        (["request", "--device", "cam-1", "--seconds", "1e9"], 10, "ask for less"),
        (["show", "no such class"], 10, "kiridashi profile request"),
    ],
)
def test_errors_name_the_next_command(run, probes, tmp_path, words, code, next_step):
    run("profile", "publish", str(tmp_path / "probes"))
    seen, data = run("profile", *words)
    assert (seen, data["error"]["code"]) == (code, code)
    assert next_step in data["error"]["next"]


def test_a_probe_set_that_is_not_whole_is_not_published(server, run, probes, tmp_path):
    folder = tmp_path / "probes"
    (folder / "probe-001.onnx").write_bytes(b"other")
    assert run("profile", "publish", str(folder))[1]["error"]["kind"] == "BundleError"
    (folder / "probes.json").write_bytes(probes.encode() + b"\n")
    assert "canonical" in run("profile", "publish", str(folder))[1]["error"]["what"]
    assert server.registry.profiles.probe_sets() == ()
    assert server.repository.published.committed().probes is None
    assert not list((server.folder / "store").rglob("*.onnx"))
