"""``kiridashi-agent measure``: what a model file, or a whole probe set, needs on this device."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.budget import MIB, Budget, Measurement, judge
from kiridashi.command import Command, Outcome
from kiridashi.config import CONFIG_NAME
from kiridashi.errors import ExitCode, InputError
from kiridashi.probes import ProbeReport, Timing

from kiridashi_agent import jobs
from kiridashi_agent.cli.place import add_state_argument, opened_config
from kiridashi_agent.profiling import ProfileSettings, measure_probes

RECORD_NAME = "record"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="an .onnx or .tflite file")
    parser.add_argument("--budget", default="", help="judge the files by it: memory=96MiB,file=4MiB,latency=5ms")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads inside one prediction")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="measure the probe set in DIR instead of files")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="of a profile: write the report there")
    parser.add_argument("--seconds", type=float, metavar="S", help="of a profile: stop then (default 600)")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    _check(arguments)
    return _profile(arguments) if arguments.profile is not None else _measure_files(arguments)


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.files) == (arguments.profile is not None):
        raise InputError(
            "measure takes model files, or --profile with a probe set",
            why="both were given" if arguments.files else "neither was given",
        )
    if arguments.profile is not None and arguments.budget:
        raise InputError("--budget judges model files, it cannot be used with --profile")
    if arguments.profile is None and (arguments.output is not None or arguments.seconds is not None):
        raise InputError("--output and --seconds belong to --profile")
    if arguments.threads < 1 or (arguments.seconds is not None and not arguments.seconds > 0):
        raise InputError("--threads and --seconds must be above zero")


def _measure_files(arguments: argparse.Namespace) -> Outcome:
    budget = Budget.parse(arguments.budget)
    rows, texts, code = [], [], ExitCode.OK
    for path in arguments.files:
        measured = jobs.measure_file(path, arguments.threads)
        verdict = judge(budget, measured)
        rows.append(
            {
                "file": str(path),
                "measured": msgspec.to_builtins(measured),
                "verdict": msgspec.to_builtins(verdict),
            }
        )
        texts.append(f"{path}: {_numbers(measured)}")
        if arguments.budget:
            texts.append(f"  {verdict.describe(budget, measured)}")
        if not verdict.within:
            code = ExitCode.BUDGET
    return Outcome({"budget": str(budget), "files": rows}, "\n".join(texts), code)


def _profile(arguments: argparse.Namespace) -> Outcome:
    output: Path | None = arguments.output
    record = output.with_name(f"{output.name}.{RECORD_NAME}") if output else arguments.profile / RECORD_NAME
    seconds = ProfileSettings.seconds if arguments.seconds is None else arguments.seconds
    configured = (arguments.state / CONFIG_NAME).is_file()
    settings = ProfileSettings(
        threads=arguments.threads,
        seconds=seconds,
        device_class=opened_config(arguments).device.device_class if configured else None,
    )
    _say(f"for up to {seconds:g} s; the record of what is done is {record}")
    try:
        report = measure_probes(
            arguments.profile, record, settings, tell=lambda done, total: _say(f"{done} of {total} measurements")
        )
    except KeyboardInterrupt:
        _say(f"stopped; what was measured is in {record}")
        raise
    if output is not None:
        write_atomic(output, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return Outcome(msgspec.to_builtins(report), _table(report), ExitCode.OK if report.complete else ExitCode.MEASURE)


def _table(report: ProbeReport) -> str:
    dense_ms = report.timings[0].quiet_ms if report.timings else 1.0
    width = max((len(timing.name) for timing in report.timings), default=5)
    rows = [f"{'graph':<{width}}  of dense     quiet ms       p95 ms  memory MiB"]
    rows += [_row(timing, dense_ms, width) for timing in report.timings]
    rows.append(
        f"{report.device_class}, {report.runtime}, {report.threads} thread(s), {report.hardware} hardware, "
        f"{report.seconds:.0f} s"
    )
    rows += [f"note: {note}" for note in report.notes]
    if not report.complete:
        rows.append("the time was up before all was measured; the same command goes on where it stopped")
    return "\n".join(rows)


def _row(timing: Timing, dense_ms: float, width: int) -> str:
    share = timing.quiet_ms / dense_ms
    return (
        f"{timing.name:<{width}}  {share:8.1%} {timing.quiet_ms:12.3f} {timing.p95_ms:12.3f} "
        f"{timing.memory_bytes / MIB:11.1f}"
    )


def _numbers(measured: Measurement) -> str:
    notes = f"; {', '.join(measured.notes)}" if measured.notes else ""
    return (
        f"p50 {measured.latency_p50_ms:.3g} ms, p95 {measured.latency_p95_ms:.3g} ms, "
        f"p99 {measured.latency_p99_ms:.3g} ms over {measured.runs} runs; peak memory "
        f"{measured.memory_bytes / MIB:.1f} MiB; load {measured.load_ms:.0f} ms; {measured.runtime}, "
        f"{measured.threads} thread(s), {measured.hardware} hardware{notes}"
    )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


COMMANDS = (Command("measure", "measure model files or a probe set on this device", _configure, _run),)
