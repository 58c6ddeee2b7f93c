from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from kiridashi.config import BrokerSection, Config, DeviceSection, LineSection, render_config
from kiridashi.drift.report import Finding, LineDrift
from kiridashi.messages import MAX_CONTROL_BYTES, ArtifactTrial, ErrorReport, LineState, encode
from kiridashi_agent import logs
from kiridashi_agent.cli import main
from kiridashi_agent.journal import Journal, LineRecord
from kiridashi_agent.machine import resident_bytes
from kiridashi_agent.reporting import HEAVY_MODULES, build_report, waits_for


def test_the_resident_size_is_read_from_the_kernel(tmp_path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmRSS:\t   2048 kB\n")
    assert resident_bytes(status) == 2 * 1024 * 1024
    assert resident_bytes(tmp_path / "none") == 0
    assert resident_bytes() > 1024 * 1024


def test_a_configured_line_without_a_record_is_idle(tmp_path) -> None:
    report = build_report("cam-1", ["press-3"], Journal(tmp_path))
    assert report.lines["press-3"].phase == "idle"
    assert report.generation == 0


def test_a_heavy_module_that_is_loaded_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch" in build_report("cam-1", [], Journal(tmp_path)).modules_forbidden_loaded


def test_the_agent_s_own_modules_load_none_of_them() -> None:
    code = (
        "import sys, kiridashi_agent.cli.run, kiridashi_agent.cli.enroll, kiridashi_agent.cli.doctor;"
        f"print([name for name in {HEAVY_MODULES!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_log_record_stays_on_one_line(capsys) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        logs.configure("info")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("x").exception("from a device:\r\n2030 INFO forged")
    finally:
        root.handlers[:], root.level = handlers, level
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_repeated_warnings_are_held_back_and_counted(caplog) -> None:
    quiet = logs.RateLimited(logging.getLogger("x"), every_s=3600)
    for _ in range(5):
        quiet.warning("the broker %s is away", "b")
    quiet.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["the broker b is away", "something else"]


def test_a_warning_that_comes_for_weeks_is_logged_ever_less_often(caplog, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    quiet = logs.RateLimited(logging.getLogger("x"), every_s=60, most_s=3600)
    for _ in range(21 * 24 * 3600 // 15):  # every 15 s for three weeks
        quiet.warning("away")
        now[0] += 15
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == ["away", "away (3 more of these before)", "away (7 more of these before)"]
    assert 21 * 24 <= len(said) <= 21 * 24 + 6
    now[0] += 3 * 3600
    quiet.warning("away")
    now[0] += 61
    quiet.warning("away")
    assert caplog.records[-1].getMessage() == "away"  # rare again, so told at once again


def test_status_says_of_every_file_why_it_was_chosen_or_not(tmp_path, capsys) -> None:
    (tmp_path / "config.toml").write_text('[device]\nid = "cam-1"\n[broker]\nhost = "localhost"\n[lines.press-3]\n')
    trials = (
        ArtifactTrial("model.onnx", chosen=True, reason="the fastest", provider="cpu", latency_p95_ms=1.25),
        ArtifactTrial("model.int8.onnx", reason="25% of the frames lost"),
        ArtifactTrial("model.tflite"),
    )
    state = LineState(phase="measuring", trials=trials)
    Journal(tmp_path / "journal").write_line("press-3", LineRecord(state=state))
    assert main(["status", "--state", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "  model.onnx: chosen, the fastest, p95 1.25 ms on cpu\n" in shown
    assert "  model.int8.onnx: 25% of the frames lost\n" in shown
    assert "  model.tflite: to be measured" in shown


@pytest.mark.parametrize(
    ("kind", "phase", "damaged", "shown"),
    [
        ("NetworkError", "fetching", False, "press-3: fetching (waits for the network), target"),
        ("ClockError", "downloading", False, "press-3: downloading (waits for the clock), target"),
        ("NetworkError", "fetching", True, "lines that run go on, a new one cannot load it"),
    ],
)
def test_status_says_what_a_line_waits_for(tmp_path, capsys, kind, phase, damaged, shown) -> None:
    config = Config(DeviceSection("cam-1", tmp_path), BrokerSection("localhost"), {"press-3": LineSection()})
    (tmp_path / "config.toml").write_text(render_config(config))
    state = LineState(phase, error=ErrorReport(kind, 40, "it is not there", phase))
    Journal(tmp_path / "journal").write_line("press-3", LineRecord(state, damaged=damaged))
    assert main(["status", "--state", str(tmp_path)]) == 0
    assert shown in capsys.readouterr().out


def test_a_line_that_works_or_rests_waits_for_nothing() -> None:
    gone_over = ErrorReport("NetworkError", 40, "it was not there", "fetching")
    assert waits_for(LineRecord(LineState("probing", error=gone_over))) == ""
    assert waits_for(LineRecord(LineState("fetching"))) == ""
    assert waits_for(LineRecord(LineState("rejected", error=gone_over))) == ""


@pytest.mark.parametrize(("lines", "examples", "findings"), [(2, 8, 6), (24, 0, 6), (100, None, None)])
def test_a_report_is_never_larger_than_the_server_takes(tmp_path, lines, examples, findings) -> None:
    journal = Journal(tmp_path)
    found = Finding("line", "image", "sharpness", "lower", 1e-4, 0.1, 0.9, 1.0, 2.0, 99, 99, 1.0, 2.0, ("e" * 60,) * 8)
    for number in range(lines):
        journal.write_drift(f"line-{number}", LineDrift("watching", "d" * 64, 400, 400, 3, 999, (found,) * 6))
        journal.write_line(f"line-{number}", LineRecord(LineState("active", version=1)))
    report = build_report("cam-1", [], journal)
    assert len(encode(report)) <= MAX_CONTROL_BYTES
    assert len(report.lines) == lines
    if findings is None:
        assert report.drift == {}
    else:
        assert {len(drift.findings) for drift in report.drift.values()} == {findings}
        assert {len(one.examples) for drift in report.drift.values() for one in drift.findings} == {examples}


@pytest.mark.parametrize(
    "command",
    [
        ["tune", "--line", "press-3"],
        ["undo", "--line", "press-3"],
        ["drift", "--now"],
        ["import", "stick"],
        ["run", "--once"],
        ["enroll", "request", "--device", "cam-1", "-o", "/nowhere/request.json"],
    ],
)
def test_nothing_is_written_into_another_account_s_state(tmp_path, monkeypatch, capsys, command) -> None:
    config = Config(DeviceSection("cam-1", tmp_path), BrokerSection("localhost"), {"press-3": LineSection()})
    (tmp_path / "config.toml").write_text(render_config(config))
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert main([*command, "--state", str(tmp_path)]) != 0
    assert "belongs to another account" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
