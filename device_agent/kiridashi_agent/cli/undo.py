"""``kiridashi-agent undo``: go back, at once and without the server."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.command import Command, Outcome
from kiridashi.errors import ExitCode, StateError
from kiridashi.manifest import decode_manifest
from kiridashi.messages import ErrorReport
from kiridashi.slots import Active, LineSlots

from kiridashi_agent.actions import with_active
from kiridashi_agent.cli.place import (
    add_line_argument,
    add_state_argument,
    check_account,
    configured_line,
    opened_config,
)
from kiridashi_agent.journal import Journal
from kiridashi_agent.lifecycle import advance


def _configure(parser: argparse.ArgumentParser) -> None:
    add_line_argument(parser)
    parser.add_argument(
        "--to",
        choices=("untuned", "previous"),
        help="the shipped weights of the active model, or the model before it (default: untuned if it is tuned)",
    )
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    config = opened_config(arguments)
    check_account(config.device.state_dir)
    line, state = configured_line(config, arguments.line), config.device.state_dir
    active = undo(state, line, arguments.to)
    what = "tuned" if active.tuned else "untuned"
    text = f"line '{line}' now serves {active.artifact} ({what}) from slot {active.slot}; a running agent reports it"
    return Outcome({"line": line, "active": msgspec.to_builtins(active)}, text)


def undo(state: Path, line: str, to: str | None) -> Active:
    """Make the untuned or the previous model of a line active again, and note it in the journal.

    Raises:
        StateError: an update of the line is under way, or there is nothing to go back to.
    """
    journal, slots = Journal(state / "journal"), LineSlots(state, line)
    with journal.lock(line, wait=False):
        record = journal.line(line)
        phase = advance(record.state.phase, "undone").phase
        active = slots.active()
        if active is None:
            raise StateError(f"line '{line}' serves no model yet", next_step="kiridashi-agent run --once")
        if to == "untuned" and not active.tuned:
            raise StateError(f"the active model of line '{line}' is not tuned")
        if active.tuned and to != "previous":
            manifest = decode_manifest((slots.folder(active.slot) / MANIFEST_NAME).read_bytes())
            active = msgspec.structs.replace(active, model_digest=manifest.digest, tuned=False)
            slots.activate(active)
        else:
            active = slots.rollback()
        unfinished = journal.tuning(line)
        if unfinished is not None and unfinished.phase == "activating":  # killed then: it would be finished over this
            error = ErrorReport(StateError.__name__, ExitCode.STATE, "it was undone before it was finished", "tuning")
            journal.write_tuning(line, msgspec.structs.replace(unfinished, phase="failed", error=error))
            slots.clear_bench()
        undone = with_active(record, active)
        journal.write_line(
            line, msgspec.structs.replace(undone, state=msgspec.structs.replace(undone.state, phase=phase))
        )
    return active


COMMANDS = (Command("undo", "go back to the untuned or the previous model", _configure, _run),)
