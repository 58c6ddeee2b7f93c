"""``kiridashi-agent status``: what the journal and the slots say, without touching the network."""

from __future__ import annotations

import argparse

import kiridashi
import msgspec
from kiridashi.command import Command, Outcome
from kiridashi.errors import StateError
from kiridashi.kept import KeptSamples
from kiridashi.messages import ArtifactTrial
from kiridashi.slots import Active, LineSlots
from kiridashi.spool import SpoolFolder

from kiridashi_agent.cli.place import add_state_argument, opened_config
from kiridashi_agent.journal import Journal, LineRecord, TuneRecord, UnreadError
from kiridashi_agent.label.summary import NamedFrames, named_frames
from kiridashi_agent.reporting import waits_for


def _run(arguments: argparse.Namespace) -> Outcome:
    config = opened_config(arguments)
    journal = Journal(config.device.state_dir / "journal")
    records = {line: LineRecord() for line in config.lines} | journal.lines()
    generation = journal.device().generation
    watches = journal.drift()
    rows = [f"device {config.device.id}, agent {kiridashi.__version__}, generation {generation}"]
    data = {}
    for line, record in sorted(records.items()):
        state, waits = record.state, waits_for(record)
        active, lost = _active(LineSlots(config.device.state_dir, line))
        spool = named_frames(SpoolFolder(config.device.state_dir, line))
        kept = KeptSamples(config.device.state_dir, line).index().counts()
        data[line] = {
            "state": msgspec.to_builtins(state),
            "waits_for": waits,
            "damaged": record.damaged,
            "active": msgspec.to_builtins(active),
            "pointer_error": lost,
            "spool": msgspec.to_builtins(spool),
            "kept": kept,
            "tuning": msgspec.to_builtins(_tuning(journal, line)),
            "drift": msgspec.to_builtins(watches.get(line)),
        }
        waiting = f" (waits for the {waits})" if waits else ""
        rows.append(f"{line}: {state.phase}{waiting}, target {state.target or 'none'}, serves {_serving(active)}")
        if record.damaged:
            rows.append("  what serves was damaged on the disk: lines that run go on, a new one cannot load it")
        if lost:
            rows.append(f"  {lost}")
        if state.error is not None:
            rows.append(f"  {state.error.kind} while {state.error.phase}: {state.error.message}")
        if state.tuning:
            rows.append(f"  tuning: {state.tuning}")
        rows += [_trial(trial) for trial in state.trials]
        if spool != NamedFrames():
            rows.append(f"  frames: {spool}")
        if kept:
            rows.append(f"  kept for tuning: {', '.join(f'{label} {count}' for label, count in kept.items())}")
        if line in watches and watches[line].findings:
            rows += [f"  drift: {finding.text}" for finding in watches[line].findings]
    profile = journal.profile()
    if profile is not None:
        measured = f", {profile.state.done} of {profile.state.total} steps" if profile.state.total else ""
        rows.append(f"profile: {profile.state.phase}{measured}")
        if profile.state.error is not None:
            rows.append(f"  {profile.state.error.kind}: {profile.state.error.message}")
    found = {
        "device": config.device.id,
        "generation": generation,
        "lines": data,
        "profile": msgspec.to_builtins(profile.state) if profile else None,
    }
    return Outcome(found, "\n".join(rows))


def _trial(trial: ArtifactTrial) -> str:
    provider = f" on {trial.provider}" if trial.provider else ""
    latency = f", p95 {trial.latency_p95_ms:.3g} ms{provider}" if trial.latency_p95_ms is not None else ""
    return f"  {trial.artifact}: {'chosen, ' if trial.chosen else ''}{trial.reason or 'to be measured'}{latency}"


def _active(slots: LineSlots) -> tuple[Active | None, str]:
    """What the line's pointer names, or why it cannot be read: the other lines are shown all the same."""
    try:
        return slots.active(), ""
    except StateError as error:
        return None, str(error)


def _tuning(journal: Journal, line: str) -> TuneRecord | None:
    """The line's last tuning; what cannot be read is left out, as :meth:`Journal.lines` has told of the line."""
    try:
        return journal.tuning(line)
    except UnreadError:
        return None


def _serving(active: Active | None) -> str:
    if active is None:
        return "nothing"
    return f"{active.artifact}{' (tuned)' if active.tuned else ''} from slot {active.slot}, {active.model_digest[:19]}"


COMMANDS = (Command("status", "show the lines and what they serve", add_state_argument, _run),)
