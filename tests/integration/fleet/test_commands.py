"""The fleet commands as a person types them, and ``serve`` as a process that is stopped by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from kiridashi.command import main
from kiridashi.enrolment import EnrolTicket, decode_enrolment, encode_enrolment
from kiridashi_server.cli import doctor, fleet, line, publish, serve
from kiridashi_server.fleet.broker import free_port
from kiridashi_server.fleet.server import PlantServer

COMMANDS = (*publish.COMMANDS, *line.COMMANDS, *fleet.COMMANDS, *serve.COMMANDS, *doctor.COMMANDS)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs one command with ``--json`` on a state folder; returns exit code and data."""

    def call(*words):
        code = main("kiridashi", "", COMMANDS, [*words, "--state", str(tmp_path / "state"), "--json"])
        return int(code), json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def port(run):
    port = free_port()
    assert run("fleet", "init", "--host", "127.0.0.1", "--port", str(port))[0] == 0
    return port


def test_from_an_empty_folder_to_an_offered_release(run, port, make_bundle, device_request, tmp_path):
    assert run("line", "add", "press-3") == (0, {"line": "press-3", "added": True})
    request, ticket = tmp_path / "cam-1.request", tmp_path / "cam-1.ticket"
    request.write_bytes(encode_enrolment(device_request("cam-1")))
    code, data = run("fleet", "enroll", str(request), "-o", str(ticket), "--lines", "press-3")
    assert (code, data["device"]) == (0, "cam-1")
    assert decode_enrolment(ticket.read_bytes(), EnrolTicket).broker_port == port
    code, data = run("publish", str(make_bundle("press-3", 1)), "--line", "press-3")
    assert (code, data["devices_told"], data["target"]) == (0, 1, "lines/press-3/1.json")
    code, data = run("publish", str(make_bundle("press-3", 2)), "--line", "press-3", "--hold")
    assert (code, data["devices_told"], data["held"]) == (0, 0, True)
    listed = {"line": "press-3", "offered": 1, "versions": [1, 2], "devices": ["cam-1"]}
    assert run("line", "list") == (0, {"lines": [listed]})
    code, data = run("fleet", "show", "cam-1")
    assert data["generation"] == 2
    assert data["lines"]["press-3"] == {"wanted": 1, "phase": "not reported", "version": 0, "tuned": False}
    assert [event["kind"] for event in data["events"]] == ["wanted", "enrolled"]
    assert run("fleet", "list")[1]["devices"][0]["connection"] == "never seen"
    assert run("fleet", "rotate-root") == (0, {"root_version": 2})


@pytest.mark.parametrize(
    ("words", "code", "next_step"),
    [
        (["fleet", "enroll", "absent", "-o", "t", "--lines", "press-3"], 10, "kiridashi-agent enroll"),
        (["fleet", "enroll", "absent", "-o", "t", "--lines", ","], 10, "--lines"),
        (["fleet", "show", "cam-9"], 10, "fleet list"),
        (["fleet", "assign", "cam-9", "--lines", "press-3"], 10, "fleet enroll"),
        (["publish", "absent", "--line", "press-3"], 30, ""),
        (["serve"], 40, "serve --with-broker"),
    ],
)
def test_errors_name_the_cause_and_the_next_command(run, port, words, code, next_step):
    run("line", "add", "press-3")
    seen, data = run(*words)
    assert (seen, data["error"]["code"]) == (code, code)
    assert next_step in data["error"]["next"]
    if words == ["serve"]:
        assert f"127.0.0.1:{port}" in data["error"]["what"]


def test_without_a_folder_every_command_says_how_to_make_one(run):
    for words in (["line", "list"], ["fleet", "list"], ["serve"], ["publish", "x", "--line", "press-3"]):
        code, data = run(*words)
        assert code == 60
        assert "kiridashi fleet init" in data["error"]["next"]


def test_the_doctor_finds_the_missing_broker_and_then_none(run, port, tmp_path):
    code, data = run("doctor")
    levels = {check["name"]: check["level"] for check in data["checks"]}
    assert (code, data["ok"]) == (40, False)
    assert levels[f"broker at 127.0.0.1:{port}"] == "failed"
    assert levels["root signature"] == "ok"
    server = PlantServer.open(tmp_path / "state")
    with server.start_broker():
        code, data = run("doctor")
    server.close()
    assert (code, data["ok"]) == (0, True)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_runs_until_a_signal_and_takes_its_broker_along(run, port, tmp_path, stop):
    program = (
        "import sys; from kiridashi.command import main; from kiridashi_server.cli import serve;"
        "sys.exit(main('kiridashi', '', serve.COMMANDS, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "serve", "--with-broker", "--json", "--state", str(tmp_path / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "stop with Ctrl-C" not in seen:
        text = process.stderr.readline()
        assert text, seen
        seen += text
    assert "broker: mosquitto with mutual TLS" in seen
    pid = int((tmp_path / "state" / "broker" / "broker.pid").read_text())
    started = time.monotonic()
    process.send_signal(stop)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(out) == {"broker": "mosquitto", "address": f"127.0.0.1:{port}", "devices": 0}
    assert time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_serve_ends_with_an_error_when_its_broker_dies(run, port, tmp_path, monkeypatch):
    """Run in this process: the broker is killed while the command waits."""

    def kill_broker(thread, broker):
        os.kill(broker.pid, signal.SIGKILL)
        broker._process.wait(5)
        return wait(thread, broker)

    wait = serve._wait_for_signal
    monkeypatch.setattr(serve, "_wait_for_signal", kill_broker)
    code, data = run("serve", "--with-broker")
    assert code == 40
    assert "ended with code -9" in data["error"]["what"]
