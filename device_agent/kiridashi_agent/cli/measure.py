"""``kiridashi-agent measure``: what model files, or a whole probe set, need on this device."""

from __future__ import annotations

import argparse
import math
import sys
from datetime import UTC, datetime
from pathlib import Path

import kiridashi
import msgspec
from kiridashi.artifacts import sha256_file, write_atomic
from kiridashi.budget import MIB, Budget
from kiridashi.command import Command, Outcome
from kiridashi.config import CONFIG_NAME
from kiridashi.errors import ExitCode, InputError, StateError
from kiridashi.probes import ProbeReport, Timing
from kiridashi.runtime import available_runtimes
from kiridashi.runtime.protocol import PREFERENCE

from kiridashi_agent import jobs
from kiridashi_agent.bench import BenchSettings, compare_files, measure_files
from kiridashi_agent.bench_report import Report, history_table, submission, table, to_csv
from kiridashi_agent.cli.place import add_state_argument, opened_config
from kiridashi_agent.history import Entry, add_to_history, read_history
from kiridashi_agent.machine import description
from kiridashi_agent.profiling import ProfileSettings, measure_probes

RECORD_NAME = "record"
_FILE_S = 2.0
_OF_FILES = ("budget", "rounds", "once", "shape", "bare", "provider", "memory_limit", "csv", "submit", "history")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="an .onnx or .tflite file")
    parser.add_argument("--budget", default="", help="judge the files by it: memory=96MiB,file=4MiB,latency=5ms")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads inside one prediction")
    parser.add_argument(
        "--provider", action="append", choices=PREFERENCE, help="what may compute the files, best first; repeatable"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1x3x224x224",
        help="shape of an input that a file leaves open; without NAME of the only one; repeatable",
    )
    parser.add_argument("--bare", action="store_true", help="time the runtime's call alone, for classifiers too")
    parser.add_argument("--rounds", type=int, metavar="N", help="processes for each file (default 2)")
    parser.add_argument(
        "--once", action="store_true", help="one process for each file, no comparison, nothing kept in the history"
    )
    parser.add_argument("--memory-limit", default="", metavar="SIZE", help="end a process over it: 256MiB")
    parser.add_argument("--csv", action="store_true", help="print rows of CSV instead of a table")
    parser.add_argument("--submit", type=Path, metavar="OUT", help="also write one file to attach to an issue")
    parser.add_argument("--history", action="store_true", help="show what was measured before, of FILE or of all")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="measure the probe set in DIR instead of files")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="of a profile: write the report there")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="of files: time predictions so long in each process (default 2); of a profile: stop then (default 600)",
    )
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    _check(arguments)
    if arguments.profile is not None:
        return _profile(arguments)
    return _history(arguments) if arguments.history else _measure_files(arguments)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.profile is not None and arguments.files:
        raise InputError("measure takes model files, or --profile with a probe set", why="both were given")
    if arguments.profile is None and not arguments.files and not arguments.history:
        raise InputError("measure takes model files, or --profile with a probe set", why="neither was given")
    misplaced = [name for name in _OF_FILES if arguments.profile is not None and getattr(arguments, name)]
    if misplaced:
        raise InputError(f"--{misplaced[0].replace('_', '-')} is for model files, it cannot be used with --profile")
    if arguments.profile is None and arguments.output is not None:
        raise InputError("--output belongs to --profile", next_step="--submit writes a report of files")
    if arguments.csv and arguments.json:
        raise InputError("--csv and --json cannot both be printed")
    numbers = (arguments.threads, arguments.seconds, arguments.rounds)
    if any(number is not None and not 0 < number < math.inf for number in numbers):
        raise InputError("--threads, --seconds and --rounds must be above zero, and no infinity")


def _measure_files(arguments: argparse.Namespace) -> Outcome:
    budget, files = Budget.parse(arguments.budget), list(dict.fromkeys(arguments.files))
    settings = _settings(arguments)
    history = () if arguments.once else _known(arguments.state)
    measured = measure_files(files, settings, budget, history, jobs, _say)
    together = len(files) > 1 and not arguments.once
    now = datetime.now(UTC)
    report = Report(
        agent_version=kiridashi.__version__,
        day=f"{now:%Y-%m-%d}",
        hardware=measured[0].measured.hardware,
        machine=description(),
        runtimes={str(name): library for name, library in available_runtimes().items()},
        budget=str(budget),
        files=measured,
        comparison=compare_files(files, settings, jobs, _say) if together else None,
    )
    if not arguments.once:
        _keep(report, arguments.state, f"{now:%Y-%m-%dT%H:%M:%SZ}")
    if arguments.submit is not None:
        write_atomic(arguments.submit, submission(report, budget))
        _say(f"written to {arguments.submit}: read it before you give it to others")
    within = all(entry.verdict.within for entry in measured)
    text = to_csv(report) if arguments.csv else table(report, budget)
    return Outcome(msgspec.to_builtins(report), text, ExitCode.OK if within else ExitCode.BUDGET)


def _settings(arguments: argparse.Namespace) -> BenchSettings:
    limit = Budget.parse(f"memory={arguments.memory_limit}").memory_bytes if arguments.memory_limit else None
    return BenchSettings(
        threads=arguments.threads,
        providers=tuple(arguments.provider or PREFERENCE),
        shapes=tuple(parse_shape(text) for text in arguments.shape),
        bare=arguments.bare,
        seconds=arguments.seconds or _FILE_S,
        rounds=1 if arguments.once else arguments.rounds or 2,
        memory_bytes=limit,
    )


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``"x=1x3x224x224"`` as the input's name and its shape; the name may be missing.

    Raises:
        InputError: it is no shape.
    """
    name, _, extents = text.rpartition("=")
    shape = tuple(int(extent) for extent in extents.split("x") if extent.isdecimal())
    if not shape or 0 in shape or len(shape) != extents.count("x") + 1:
        raise InputError(f"the shape '{text}' cannot be read", next_step="write it like --shape NAME=1x3x224x224")
    return name, shape


def _known(state: Path) -> tuple[Entry, ...]:
    try:
        return read_history(state)
    except StateError as error:
        _say(str(error))  # the state folder may be another account's, and measuring needs none
        return ()


def _keep(report: Report, state: Path, at: str) -> None:
    entries = [
        Entry(at, Path(entry.file).name, entry.sha256, report.agent_version, entry.measured) for entry in report.files
    ]
    try:
        add_to_history(state, entries)
    except StateError as error:
        _say(str(error))  # the figures are there all the same


def _history(arguments: argparse.Namespace) -> Outcome:
    wanted = {sha256_file(path) for path in arguments.files if _is_file(path)}
    entries = [entry for entry in read_history(arguments.state) if not wanted or entry.sha256 in wanted]
    return Outcome({"entries": msgspec.to_builtins(entries)}, history_table(entries, as_csv=arguments.csv))


def _is_file(path: Path) -> bool:
    if not path.is_file():
        raise InputError(f"the model file {path} does not exist")
    return True


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
    return Outcome(
        msgspec.to_builtins(report), _profile_table(report), ExitCode.OK if report.complete else ExitCode.MEASURE
    )


def _profile_table(report: ProbeReport) -> str:
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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


COMMANDS = (Command("measure", "measure model files or a probe set on this device", _configure, _run),)
