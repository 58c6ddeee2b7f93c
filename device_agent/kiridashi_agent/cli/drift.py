"""``kiridashi-agent drift``: what the drift watch says of the lines, and what an operator says to it."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from kiridashi.command import Command, Outcome
from kiridashi.config import Config
from kiridashi.drift.report import LineDrift
from kiridashi.errors import InputError, StateError

from kiridashi_agent import jobs
from kiridashi_agent.cli.place import add_state_argument, check_account, configured_line, opened_config
from kiridashi_agent.journal import Journal
from kiridashi_agent.watching import WATCH_LOCK, look, watched_lines


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--line", metavar="NAME", help="this line only (default: all)")
    parser.add_argument("--now", action="store_true", help="look at what the lines have noted first")
    parser.add_argument(
        "--accept", action="store_true", help="the line is fine as it is: learn anew what it looks like (with --line)"
    )
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    config = opened_config(arguments)
    if arguments.now or arguments.accept:
        check_account(config.device.state_dir)
    journal = Journal(config.device.state_dir / "journal")
    chosen = [configured_line(config, arguments.line)] if arguments.line else sorted(config.lines)
    if arguments.accept:
        if not arguments.line:
            raise InputError("--accept needs the line", next_step="kiridashi-agent drift --accept --line NAME")
        _forget(config.device.state_dir, journal, arguments.line)
    if arguments.now:
        _look(config, journal, chosen)
    watches = journal.drift()
    shown = {line: watches.get(line) for line in chosen}
    text = "\n".join(row for line, drift in shown.items() for row in rows_of(line, drift, config))
    return Outcome({"lines": msgspec.to_builtins(shown)}, text or "no line is configured")


def rows_of(line: str, drift: LineDrift | None, config: Config) -> list[str]:
    """What a person reads of one line."""
    if not config.lines[line].watch:
        return [f"{line}: not watched (watch = false)"]
    if drift is None:
        return [f"{line}: nothing noted yet; open the line's model with spool=True"]
    if drift.phase == "learning":
        return [f"{line}: learning what it looks like, {drift.learnt} of {drift.wanted} frames"]
    rows = [f"{line}: watching, {drift.sampled} frames sampled, one of {drift.stride} used; {_verdict(drift)}"]
    for finding in drift.findings:
        rows.append(f"  {finding.text}")
        if finding.examples:
            rows.append(f"    {len(finding.examples)} frames that show it wait: kiridashi-agent label --line {line}")
    return rows


def _verdict(drift: LineDrift) -> str:
    changed = [finding.signal for finding in drift.findings if finding.reference == "line"]
    unlike = [finding.signal for finding in drift.findings if finding.reference == "server"]
    parts = [f"changed: {', '.join(changed)}"] if changed else ["no change"]
    return "; ".join([*parts, *([f"unlike the server's samples: {', '.join(unlike)}"] if unlike else [])])


def _look(config: Config, journal: Journal, chosen: list[str]) -> None:
    lines = {line: wanted for line, wanted in watched_lines(config).items() if line in chosen}
    outcome = look(config.device.state_dir, journal, lines, jobs.watch, publish=None)
    for line, why in outcome.failed.items():
        raise StateError(f"line '{line}' cannot be looked at", why=why)


def _forget(state_dir: Path, journal: Journal, line: str) -> None:
    with journal.lock(WATCH_LOCK, wait=True):
        (state_dir / "drift" / f"{line}.json").unlink(missing_ok=True)
        journal.write_drift(line, None)


COMMANDS = (Command("drift", "show whether a line still looks as it did", _configure, _run),)
