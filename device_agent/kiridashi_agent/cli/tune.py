"""``kiridashi-agent tune``: tune what a line serves now, without the server and while the line goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from kiridashi.budget import MIB
from kiridashi.command import Command, Outcome
from kiridashi.config import Config
from kiridashi.errors import ExitCode, InputError
from kiridashi.kept import KeptSamples
from kiridashi.slots import LineSlots
from kiridashi.spool import SpoolFolder

from kiridashi_agent import jobs
from kiridashi_agent.cli.place import (
    add_line_argument,
    add_state_argument,
    check_account,
    configured_line,
    opened_config,
)
from kiridashi_agent.jobs import Survey
from kiridashi_agent.journal import Journal
from kiridashi_agent.label.summary import named_frames
from kiridashi_agent.machine import hottest_celsius
from kiridashi_agent.metadata import TrustStore, read_pinned_root
from kiridashi_agent.retune import LineTuner, TuneWish, told
from kiridashi_agent.tune_terms import tune_limits, tune_request


def _configure(parser: argparse.ArgumentParser) -> None:
    add_line_argument(parser)
    parser.add_argument(
        "--samples",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="an .npz file, a folder of them, or a folder with one sub-folder of pictures for each class; "
        "beside the line's own, the named frames, and those kept from earlier; may be repeated",
    )
    parser.add_argument(
        "--time", type=float, metavar="SECONDS", help="for the iterations (default: tune_seconds of the line)"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--dry-run", action="store_true", help="say what would be used, and change nothing")
    group.add_argument("--forget", action="store_true", help="delete the samples kept from earlier tunings instead")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    config = opened_config(arguments)
    check_account(config.device.state_dir)
    line = configured_line(config, arguments.line)
    if arguments.forget:
        if arguments.samples or arguments.time is not None:
            raise InputError("--forget takes neither --samples nor --time", why="it tunes nothing")
        return _forget(config, line)
    if arguments.time is not None and not 0 < arguments.time <= config.limits.job_timeout_s:
        raise InputError(f"--time is above 0 and at most job_timeout_s, {config.limits.job_timeout_s:g} s")
    state = config.device.state_dir
    journal = Journal(state / "journal")
    trust = TrustStore(state / "trust" / "metadata", read_pinned_root(state))
    tuner = LineTuner(config, journal, trust, jobs)
    wish = TuneWish("asked", tuple(path.absolute() for path in arguments.samples), arguments.time)
    if arguments.dry_run:
        return _would_use(line, tuner.survey(line, wish), config, arguments.time)
    record = tuner.tune(line, wish)
    active = LineSlots(state, line).served()
    kept = record.report is not None and record.report.kept
    data = {
        "line": line,
        "kept": kept,
        "report": msgspec.to_builtins(record.report),
        "active": msgspec.to_builtins(active),
    }
    serves = f"it serves {active.artifact} ({'tuned' if active.tuned else 'untuned'}) from slot {active.slot}"
    way_back = f"; to go back: kiridashi-agent undo --line {line} --to previous" if kept else ""
    return Outcome(data, f"line '{line}': {told(record)}\n{serves}{way_back}", ExitCode.OK if kept else ExitCode.TUNE)


def _would_use(line: str, survey: Survey, config: Config, seconds: float | None) -> Outcome:
    rows = [f"{'class':<20} {'learn':>6} {'hold-out':>9}  the gate"]
    for label, found in survey.classes.items():
        gate = "cannot protect it" if found.refused_from is None else f"refuses a loss of {found.refused_from} or more"
        rows.append(f"{label:<20} {found.learn:>6} {found.holdout:>9}  {gate}")
    rows.append("from: " + (", ".join(f"{source} {count}" for source, count in survey.sources.items()) or "nowhere"))
    if survey.shortage:
        rows.append(f"too few to tune: {survey.shortage}")
    request = tune_request(config, line, "bench", "", (), seconds)
    memory = tune_limits(config, request, None).memory_bytes
    sensor = hottest_celsius() is not None
    rows.append(
        f"limits: {request.max_seconds:g} s, {memory // MIB if memory else 'no'} MiB, {request.max_celsius:g} C"
        + ("" if sensor else " (this board has no sensor: temperature bounds nothing)")
    )
    limits = {"seconds": request.max_seconds, "memory_bytes": memory, "celsius": request.max_celsius, "sensor": sensor}
    data = {"line": line, **msgspec.to_builtins(survey), "limits": limits}
    return Outcome(data, "\n".join(rows), ExitCode.TUNE if survey.shortage else ExitCode.OK)


def _forget(config: Config, line: str) -> Outcome:
    state = config.device.state_dir
    with Journal(state / "journal").lock(line, wait=False):
        forgotten = KeptSamples(state, line).forget()
    named = sum(named_frames(SpoolFolder(state, line)).named.values())
    text = f"line '{line}': {forgotten} kept samples deleted; {named} named frames stay in the spool"
    return Outcome({"line": line, "forgotten": forgotten, "named": named}, text)


COMMANDS = (Command("tune", "tune the model that a line serves, on samples of this device", _configure, _run),)
