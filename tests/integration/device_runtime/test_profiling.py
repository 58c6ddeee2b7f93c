"""Profiling with real runtimes and real child processes, on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from kiridashi.artifacts import describe_file
from kiridashi.budget import MIB
from kiridashi.errors import BundleError, ExitCode, RuntimeUnavailableError
from kiridashi.probes import ProbeGraph, ProbeReport, ProbeSet, decode_probe_report
from kiridashi_agent import jobs, profiling
from kiridashi_agent.cli import main
from kiridashi_agent.process import JobCancelledError, Limits, MemoryLimitError
from kiridashi_agent.profile_record import Record
from kiridashi_agent.profiling import ProfileSettings, measure_probes
from kiridashi_agent.subject import open_plain

SHORT = ProfileSettings(seconds=60.0)


def make_set(shipped: Path, folder: Path, graphs: int = 3, suffix: str = "onnx") -> Path:
    """A probe set of copies of the tiny bundle's model."""
    folder.mkdir()
    listed = []
    for n in range(graphs):
        path = folder / f"cut-{n}.{suffix}"
        shutil.copy(shipped / f"model.{suffix}", path)
        artifact = describe_file(path, "onnx-fp32" if suffix == "onnx" else "tflite-fp32")
        listed.append(ProbeGraph(artifact=artifact, role="cut", widths={"conv": 12 - n}))
    probes = ProbeSet(
        name=f"tiny-16-{suffix}",
        backbone="tiny",
        backbone_fingerprint="sha256:" + "0" * 64,
        layout_digest="sha256:" + "1" * 64,
        height=16,
        width=16,
        runtime="onnxruntime" if suffix == "onnx" else "litert",
        graphs=tuple(listed),
    )
    (folder / "probes.json").write_bytes(probes.encode())
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few runs and rounds: what is tested is not how well they repeat."""
    monkeypatch.setattr(profiling, "_ALONE_S", (0.05, 0.05))
    request = jobs.InterleaveRequest
    monkeypatch.setattr(jobs, "InterleaveRequest", lambda **fields: request(**fields, max_rounds=5))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What children were asked for."""
    seen: list[str] = []
    real = jobs._run

    def noted(job: str, *rest: object, **named: object) -> object:
        seen.append(job)
        return real(job, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "_run", noted)
    return seen


@pytest.mark.parametrize(("suffix", "runtime"), [("onnx", "onnxruntime "), ("tflite", "ai-edge-litert ")])
@pytest.mark.usefixtures("quick")
def test_a_whole_profile_and_the_second_call_measures_nothing(
    shipped: Path, tmp_path: Path, calls: list[str], suffix: str, runtime: str
) -> None:
    folder, record = make_set(shipped, tmp_path / "set", suffix=suffix), tmp_path / "record"
    told: list[tuple[int, int]] = []
    report = measure_probes(folder, record, SHORT, tell=lambda *steps: told.append(steps))
    assert calls == ["measure"] * 3 + ["interleave"] * 2
    assert told == [(0, 9), (1, 9), (2, 9), (3, 9), (6, 9), (9, 9)]
    assert report.complete
    assert report.runtime.startswith(runtime)
    assert [timing.name for timing in report.timings] == [f"cut-{n}.{suffix}" for n in range(3)]
    for timing in report.timings:
        assert 0 < timing.quiet_ms == min(timing.halves_ms) < 100
        assert timing.p50_ms / 3 < timing.quiet_ms < timing.p95_ms * 3
        assert timing.runs == 2 * 5 * jobs.TURN
        assert 20 * MIB < timing.memory_bytes < 150 * MIB
    assert decode_probe_report(msgspec.json.encode(report)) == report
    (folder / f"cut-1.{suffix}").unlink()  # a finished record does not need the files
    assert measure_probes(folder, record, SHORT) == report
    assert len(calls) == 5


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_with_one_thread_the_runtime_computes_in_the_calling_thread(shipped: Path, name: str) -> None:
    subject = open_plain(shipped / name, jobs.MeasureRequest(""))
    assert (subject.timed, subject.in_thread) == ("line", True)
    subject.once(0)
    before = time.thread_time_ns(), time.process_time_ns()
    for n in range(2000):
        subject.once(n)
    thread, process = time.thread_time_ns() - before[0], time.process_time_ns() - before[1]
    assert thread > 0.95 * process


def test_interleaving_gives_equal_files_equal_times(shipped: Path, tmp_path: Path) -> None:
    folder = make_set(shipped, tmp_path / "set", 4)
    names = tuple(f"cut-{n}.onnx" for n in range(4))
    done = jobs.interleave(jobs.InterleaveRequest(str(folder), names, max_rounds=200, seconds=20.0), Limits(60.0))
    times = np.array([done.quiet_ms[name] for name in names])
    assert tuple(done.quiet_ms) == names
    assert done.rounds >= 2
    assert times.max() / times.min() < 1.25


@pytest.mark.usefixtures("quick")
def test_more_threads_are_timed_by_the_clock_on_the_wall(shipped: Path, tmp_path: Path) -> None:
    folder = make_set(shipped, tmp_path / "set", 2)
    report = measure_probes(folder, tmp_path / "record", settings(threads=2))
    assert (report.complete, report.threads) == (True, 2)


def settings(**fields: float) -> ProfileSettings:
    return ProfileSettings(**{"seconds": 60.0, **fields})  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick")
def test_little_memory_is_shared_out_in_batches(shipped: Path, tmp_path: Path, calls: list[str]) -> None:
    folder, record = make_set(shipped, tmp_path / "set", 4), tmp_path / "record"
    first = measure_probes(folder, record, SHORT)
    kept = msgspec.json.decode(record.read_bytes(), type=Record)
    peaks = [timing.memory_bytes for timing in first.timings]
    # Room for the process and two models, as they were measured alone; then also the limit of each child.
    limit = max(peaks) + 8 * MIB
    assert max(peaks) - min(peaks) < 4 * MIB
    grown = {
        name: msgspec.structs.replace(one, memory_bytes=one.memory_bytes + 5 * MIB * (name != "cut-0.onnx"))
        for name, one in kept.alone.items()
    }
    record.write_bytes(msgspec.json.encode(msgspec.structs.replace(kept, alone=grown, sittings=())))
    calls.clear()
    report = measure_probes(folder, record, settings(memory_bytes=limit))
    assert calls == ["interleave"] * 6
    sittings = msgspec.json.decode(record.read_bytes(), type=Record).sittings
    assert [sorted(sitting.quiet_ms) for sitting in sittings[:3]] == [
        ["cut-0.onnx", f"cut-{n}.onnx"] for n in (1, 2, 3)
    ]
    assert report.complete


def test_over_the_memory_limit_is_an_error_that_keeps_what_was_measured(shipped: Path, tmp_path: Path) -> None:
    folder = make_set(shipped, tmp_path / "set", 1)
    with pytest.raises(MemoryLimitError, match="needs more memory") as caught:
        measure_probes(folder, tmp_path / "record", settings(memory_bytes=8 * MIB))
    assert "stop other programs" in caught.value.next_step


def test_a_damaged_file_is_refused_before_anything_runs(shipped: Path, tmp_path: Path, calls: list[str]) -> None:
    folder, record = make_set(shipped, tmp_path / "set"), tmp_path / "record"
    data = bytearray((folder / "cut-2.onnx").read_bytes())
    data[100] ^= 1
    (folder / "cut-2.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"cut-2\.onnx is not the file"):
        measure_probes(folder, record, SHORT)
    (folder / "probes.json").unlink()
    with pytest.raises(BundleError, match="is not a probe set"):
        measure_probes(folder, record, SHORT)
    assert calls == []
    assert not record.exists()


def test_without_the_runtime(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "available_runtimes", dict)
    with pytest.raises(RuntimeUnavailableError, match="'litert', which is not installed") as caught:
        measure_probes(make_set(shipped, tmp_path / "set", suffix="tflite"), tmp_path / "record", SHORT)
    assert "kiridashi[litert]" in caught.value.next_step


@pytest.mark.usefixtures("quick")
def test_the_time_is_kept_and_calls_add_up(shipped: Path, tmp_path: Path) -> None:
    graphs = 40  # starting a process for each takes longer than one call may
    folder, record = make_set(shipped, tmp_path / "set", graphs), tmp_path / "record"
    steps = []
    for _ in range(80):
        begun = time.monotonic()
        report = measure_probes(folder, record, settings(seconds=3.0))
        assert time.monotonic() - begun < 4.5
        kept = msgspec.json.decode(record.read_bytes(), type=Record) if record.exists() else None
        steps.append(sum(kept.steps(f"cut-{n}.onnx") for n in range(graphs)) if kept else 0)
        if report.complete:
            break
    assert report.complete
    assert len(steps) > 1
    assert steps == sorted(steps)
    assert report.seconds > 3.0


def test_cancelling_stops_at_once_and_keeps_the_record(shipped: Path, tmp_path: Path) -> None:
    folder, record = make_set(shipped, tmp_path / "set"), tmp_path / "record"
    cancel = threading.Event()

    def after_one(done: int, _total: int) -> None:
        if done == 1:
            cancel.set()

    with pytest.raises(JobCancelledError):
        measure_probes(folder, record, SHORT, cancel=cancel, tell=after_one)
    assert list(msgspec.json.decode(record.read_bytes(), type=Record).alone) == ["cut-0.onnx"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from kiridashi_agent.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "measure", "--profile", str(folder), "--state", str(folder), *arguments]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )


def wait_for_steps(process: subprocess.Popen[str], steps: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"{steps} of "):
            return
    raise AssertionError("the program ended before")


def test_killed_in_the_middle_it_goes_on_where_it_was(shipped: Path, tmp_path: Path) -> None:
    folder, output = make_set(shipped, tmp_path / "set"), tmp_path / "report.json"
    process = start(folder, "-o", str(output))
    wait_for_steps(process, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    record = tmp_path / "report.json.record"
    before = msgspec.json.decode(record.read_bytes(), type=Record)
    assert len(before.alone) == 2
    assert not output.exists()

    process = start(folder, "-o", str(output), "--seconds", "30")
    wait_for_steps(process, 3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"what was measured is in {record}" in said
    assert "the same command goes on where it stopped" in said

    process = start(folder, "-o", str(output), "--seconds", "20", "--json")
    text, _ = process.communicate()
    assert process.returncode == ExitCode.OK
    report = decode_probe_report(output.read_bytes())
    assert msgspec.convert(json.loads(text), ProbeReport) == report
    assert report.complete
    for timing in report.timings[:2]:
        assert timing.p50_ms == before.alone[timing.name].p50_ms


@pytest.mark.usefixtures("quick")
def test_the_command_tells_what_it_found(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_set(shipped, tmp_path / "set")
    (tmp_path / "config.toml").write_text(
        '[device]\nid = "cam-1"\ndevice_class = "press-camera"\n[broker]\nhost = "localhost"\n'
    )
    common = ["measure", "--profile", str(folder), "--state", str(tmp_path)]
    assert main([*common, "--seconds", "0.01"]) == ExitCode.MEASURE
    assert "0.01 s are too short" in capsys.readouterr().err
    many, output = make_set(shipped, tmp_path / "many", 40), tmp_path / "report.json"
    unfinished = ["measure", "--profile", str(many), "--state", str(tmp_path), "-o", str(output), "--seconds", "3"]
    assert main(unfinished) == ExitCode.MEASURE
    assert not decode_probe_report(output.read_bytes()).complete
    assert "the same command goes on" in capsys.readouterr().out
    assert main(common) == ExitCode.OK
    out, said = capsys.readouterr()
    assert "cut-0.onnx    100.0%" in out
    assert "press-camera, onnxruntime" in out
    assert str(folder / "record") in said
    assert "9 of 9 measurements" in said


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model.onnx", "--profile", "set"],
        ["--profile", "set", "--budget", "file=1MiB"],
        ["model.onnx", "-o", "report.json"],
        ["model.onnx", "--csv", "--json"],
        ["--profile", "set", "--history"],
        ["--profile", "set", "--seconds", "0"],
        ["--profile", "set", "--threads", "0"],
    ],
)
def test_arguments_that_do_not_go_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *arguments]) == ExitCode.INPUT
    assert "--" in capsys.readouterr().err
