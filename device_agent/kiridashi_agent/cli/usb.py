"""``kiridashi-agent import``: a bundle from a memory stick, with the same checks and steps as from the server."""

from __future__ import annotations

import argparse
import threading
from functools import partial
from pathlib import Path

import msgspec
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.command import Command, Outcome
from kiridashi.config import Config
from kiridashi.errors import BundleError, ExitCode, NetworkError, TrustError
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi.messages import LineState
from kiridashi.slots import LineSlots
from kiridashi.stick import StickIndex

from kiridashi_agent import jobs, logs
from kiridashi_agent.actions import Actions
from kiridashi_agent.agent import Agent
from kiridashi_agent.cli.place import add_state_argument, check_account, configured_line, opened_config
from kiridashi_agent.cli.run import stopped_by_signals
from kiridashi_agent.inspection import damage
from kiridashi_agent.journal import Journal
from kiridashi_agent.lifecycle import RESTING
from kiridashi_agent.metadata import TrustStore, read_pinned_root
from kiridashi_agent.profile_task import ProfileTask
from kiridashi_agent.profile_worker import ProfileWorker
from kiridashi_agent.profiling import measure_probes
from kiridashi_agent.stick import StickTransport, opened
from kiridashi_agent.transport import NotFoundError

_WRITE_AGAIN = "write the stick again on the server (kiridashi fleet export-usb)"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="the folder or .tar file that 'kiridashi fleet export-usb' wrote")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="warning", help="how much to log")
    add_state_argument(parser)


def _run(arguments: argparse.Namespace) -> Outcome:
    logs.configure(arguments.log_level)
    config = opened_config(arguments)
    check_account(config.device.state_dir)
    stop = threading.Event()
    with opened(arguments.path) as stick, stopped_by_signals(stop):
        index = stick.index()
        line = configured_line(config, index.line)
        manifest = verified(config, stick, index)
        if serves_soundly(config, line, manifest.digest):
            text = f"line '{line}' serves version {manifest.version} already; nothing was changed"
            return Outcome({"line": line, "version": manifest.version, "phase": "active", "changed": False}, text)
        state = _bring_in(config, stick, index, stop)
    return _outcome(line, state, stopped=stop.is_set())


def verified(config: Config, stick: StickTransport, index: StickIndex) -> Manifest:
    """The stick's manifest, checked whole before anything of the line is touched; the device's metadata moves on.

    Raises:
        TrustError: a signature, version or expiry failed, or an older version than the one that serves.
        BundleError, InputError, NetworkError: the stick is incomplete, or its content is not what it says.
    """
    state = config.device.state_dir
    trust = TrustStore(state / "trust" / "metadata", read_pinned_root(state))
    try:
        manifest = trust.fetch_manifest(stick, index.line, index.target)
    except TrustError as error:
        raise TrustError(error.what, why=error.why, next_step=_next_step(error, index)) from error
    except NotFoundError as error:
        raise BundleError("the stick is incomplete", why=str(error), next_step=_WRITE_AGAIN) from error
    serving = _serving(state, index.line)
    if serving is not None and manifest.version < serving.version:
        raise TrustError(
            f"version {manifest.version} for line '{index.line}' was refused",
            why=f"version {serving.version} serves, and an import never goes back",
            next_step="go back with kiridashi-agent undo --to previous, or publish the old model as a new version",
        )
    return manifest


def serves_soundly(config: Config, line: str, digest: str) -> bool:
    """Whether the line serves the bundle with this digest, tuned or not, and its files are as they were activated."""
    state, slots = config.device.state_dir, LineSlots(config.device.state_dir, line)
    active, serving = slots.active(), _serving(state, line)
    if active is None or serving is None or serving.digest != digest:
        return False
    trust = TrustStore(state / "trust" / "metadata", read_pinned_root(state))
    return damage(slots, active, partial(trust.check_seal, state)) is None


def _serving(state: Path, line: str) -> Manifest | None:
    slots = LineSlots(state, line)
    active = slots.active()
    if active is None:
        return None
    path = slots.folder(active.slot) / MANIFEST_NAME
    try:
        return decode_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, BundleError):
        return None  # a damaged slot: whatever comes is better


def _bring_in(config: Config, stick: StickTransport, index: StickIndex, stop: threading.Event) -> LineState:
    state = config.device.state_dir
    journal, trust = Journal(state / "journal"), TrustStore(state / "trust" / "metadata", read_pinned_root(state))
    profiles = ProfileWorker(ProfileTask(config, stick, trust, journal, measure_probes))
    agent = Agent(config, stick, journal, Actions(config, stick, trust, jobs, stop), profiles, stop)
    return agent.bring_in(index.line, index.target)


def _next_step(error: TrustError, index: StickIndex) -> str:
    if "expired" in error.what:
        return (
            f"look at this device's clock first (date): the stick holds until {index.valid_until}. If the clock is "
            f"wrong, set it (timedatectl set-time); if it is right, {_WRITE_AGAIN}"
        )
    if "rollback" in error.what:
        return f"this device has seen newer metadata than the stick's: {_WRITE_AGAIN}"
    if "clock" in error.what:
        return "set the clock (timedatectl set-time 'YYYY-MM-DD hh:mm'), then import again"
    return f"{_WRITE_AGAIN}; nothing was changed here"


def _outcome(line: str, state: LineState, *, stopped: bool) -> Outcome:
    data = {"line": line, "changed": state.phase == "active", **msgspec.to_builtins(state)}
    if state.phase == "active":
        tuned = ", tuned on this device's samples" if state.tuned else ""
        return Outcome(data, f"line '{line}' now serves version {state.version} ({state.artifact}{tuned})")
    why = state.error.message if state.error else "it was interrupted"
    if state.phase in RESTING:
        code = ExitCode(state.error.code) if state.error else ExitCode.STATE
        return Outcome(data, f"line '{line}' keeps its model; version {state.version} is {state.phase}: {why}", code)
    if stopped:
        return Outcome(data, f"line '{line}' is {state.phase}; import again to go on", ExitCode.INTERRUPTED)
    raise NetworkError(
        f"line '{line}' stopped while {state.phase}",
        why=why,
        next_step="put the stick in again, then run the same command: it goes on where it stopped",
    )


COMMANDS = (Command("import", "take a bundle from a memory stick, checked as from the server", _configure, _run),)
