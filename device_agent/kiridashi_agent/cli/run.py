"""``kiridashi-agent run``: the agent itself, as a service or until the present wish is settled."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import msgspec
from kiridashi.command import Command, Outcome
from kiridashi.errors import ExitCode, InputError
from kiridashi.messages import Reported

from kiridashi_agent import jobs, logs
from kiridashi_agent.actions import Actions
from kiridashi_agent.agent import Agent
from kiridashi_agent.broker import MqttSettings
from kiridashi_agent.cage import take_over_own_group
from kiridashi_agent.cli.place import add_state_argument, check_account, opened_config
from kiridashi_agent.journal import Journal
from kiridashi_agent.metadata import TrustStore, read_pinned_root
from kiridashi_agent.mqtt import MqttTransport
from kiridashi_agent.profile_task import ProfileTask
from kiridashi_agent.profile_worker import ProfileWorker
from kiridashi_agent.profiling import measure_probes
from kiridashi_agent.retune import LineTuner
from kiridashi_agent.service import ServiceManager, StopSignal
from kiridashi_agent.tune_worker import TuneWorker
from kiridashi_agent.watching import DriftWatcher

AGENT_LOCK = "agent"
QUIET_S = 2.0


def _configure(parser: argparse.ArgumentParser) -> None:
    add_state_argument(parser)
    parser.add_argument("--once", action="store_true", help="end when every line rests and a profile is sent")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="with --once: give up then")
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info", help="how much to log")


def _run(arguments: argparse.Namespace) -> Outcome:
    if not 0 <= arguments.timeout <= threading.TIMEOUT_MAX:
        raise InputError("--timeout is a number of seconds, at least 0")
    logs.configure(arguments.log_level)
    config = opened_config(arguments)
    check_account(config.device.state_dir)
    journal = Journal(config.device.state_dir / "journal")
    trust = TrustStore(config.device.state_dir / "trust" / "metadata", read_pinned_root(config.device.state_dir))
    transport = MqttTransport(MqttSettings.from_config(config))
    manager = ServiceManager.from_environment(os.environ, os.getpid())
    take_over_own_group()
    stop = StopSignal(manager, transport.is_alive, lambda: status_line(journal))
    with journal.lock(AGENT_LOCK, wait=False), stopped_by_signals(stop):
        actions = Actions(config, transport, trust, jobs, stop)
        profiles = ProfileWorker(ProfileTask(config, transport, trust, journal, measure_probes))
        tunings = TuneWorker(config, journal, LineTuner(config, journal, trust, jobs))
        watcher = DriftWatcher(config, journal, jobs.watch, transport.publish_event)
        agent = Agent(config, transport, journal, actions, profiles, stop, (tunings, watcher))
        transport.start()
        manager.tell(READY="1", STATUS=status_line(journal))
        try:
            if not arguments.once:
                agent.run()
                return Outcome({"stopped": True})
            transport.wait_connected(arguments.timeout)
            report = agent.run_until_settled(arguments.timeout, QUIET_S)
            transport.flush(timeout_s=10.0)
        finally:
            manager.tell(STOPPING="1")
            transport.stop()
    if stop.is_set():
        return Outcome(msgspec.to_builtins(report), "stopped", ExitCode.INTERRUPTED)
    return _outcome(report)


def _outcome(report: Reported) -> Outcome:
    rows, worst = [], ExitCode.OK
    for line, state in sorted(report.lines.items()):
        serving = (
            f"{state.artifact} in slot {state.slot}{' (tuned)' if state.tuned else ''}" if state.slot else "nothing"
        )
        why = f": {state.error.message}" if state.error else ""
        rows.append(f"{line}: {state.phase}, target {state.target or 'none'}, serves {serving}{why}")
        if state.phase == "rejected" and state.error is not None:
            worst = ExitCode(state.error.code)
    return Outcome(msgspec.to_builtins(report), "\n".join(rows) or "no line is configured", worst)


def status_line(journal: Journal) -> str:
    """Every line's phase and version, for the service manager."""
    states = {line: record.state for line, record in journal.lines().items()}
    return ", ".join(f"{line} {state.phase} {state.version}" for line, state in states.items()) or "no line has a model"


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set ``stop``: the agent then ends between two steps, and a running job at once."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMANDS = (Command("run", "run the agent", _configure, _run),)
