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
from kiridashi_agent.retune import told


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

    A tuning of the line makes way for it, and is not begun again by itself: it would undo this.

    Raises:
        StateError: an update of the line is under way, or there is nothing to go back to.
    """
    journal, slots = Journal(state / "journal"), LineSlots(state, line)
    with journal.lock_first(line):
        record = journal.line(line)
        phase = advance(record.state.phase, "undone").phase
        active = slots.active()
        if active is None:
            raise StateError(f"line '{line}' serves no model yet", next_step="kiridashi-agent run --once")
        if to == "untuned" and not active.tuned:
            raise StateError(f"the active model of line '{line}' is not tuned")
        if active.tuned and to != "previous":
            active = msgspec.structs.replace(active, model_digest=_digest(slots, active), tuned=False)
            slots.activate(active)
        else:
            active = slots.rollback()
        state_now = msgspec.structs.replace(with_active(record, active).state, phase=phase)
        tuning = journal.tuning(line)
        # One that was killed while activating would be finished over this, and one that made way would be repeated.
        if tuning is not None and (tuning.phase == "activating" or tuning.is_to_be_repeated):
            error = ErrorReport(StateError.__name__, ExitCode.STATE, "it was undone before it was finished", "tuning")
            tuning = msgspec.structs.replace(tuning, phase="failed", error=error)
            journal.write_tuning(line, tuning)
            slots.clear_bench()
            state_now = msgspec.structs.replace(state_now, tuning=told(tuning))
        journal.write_line(line, msgspec.structs.replace(record, state=state_now))
    return active


def _digest(slots: LineSlots, active: Active) -> str:
    path = slots.folder(active.slot) / MANIFEST_NAME
    try:
        return decode_manifest(path.read_bytes(), str(path)).digest
    except OSError as error:
        step = f"kiridashi-agent undo --line {slots.line} --to previous, or let the agent fetch the model again"
        raise StateError(f"{path} cannot be read", why=str(error), next_step=step) from error


COMMANDS = (Command("undo", "go back to the untuned or the previous model", _configure, _run),)
