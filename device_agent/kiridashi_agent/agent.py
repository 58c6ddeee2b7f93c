"""The agent: takes what the server wants, drives each line through its lifecycle, and reports what is true.

The journal is the only memory. Whatever happens to the process, starting it again goes on from there; the server's
wish is retained at the broker and comes again by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
from kiridashi.artifacts import sweep
from kiridashi.config import Config
from kiridashi.errors import ExitCode, KiridashiError, NetworkError, StateError
from kiridashi.messages import Desired, ErrorReport, LineState, Reported
from kiridashi.slots import LineSlots

from kiridashi_agent.actions import Actions, with_error
from kiridashi_agent.adoption import Adoption, HeldLocks
from kiridashi_agent.background import IdleWork
from kiridashi_agent.inspection import fallen_back, inspected
from kiridashi_agent.journal import MAX_ATTEMPTS, Journal, LineRecord, UnreadError
from kiridashi_agent.lifecycle import RESTING, Action, Event, advance, resume
from kiridashi_agent.logs import RateLimited
from kiridashi_agent.metadata import PINNED_ROOT
from kiridashi_agent.process import JobCancelledError
from kiridashi_agent.profile_worker import ProfileWorker
from kiridashi_agent.reporting import build_report
from kiridashi_agent.transport import Transport
from kiridashi_agent.wishes import imported

_LOG = logging.getLogger(__name__)
TICK_S = 1.0
INSPECT_EVERY_S = 24 * 3600.0
INSPECT_AGAIN_S = 60.0
_UNCOUNTED: frozenset[Action] = frozenset({"fetch", "download"})
_WISH, _DEVICE = "a wish", "the device"  # no line can be called that
_replace = msgspec.structs.replace


class Agent:
    """One device's agent over its parts.

    Args:
        config: the device's settings.
        transport: the wire; it may be connected or not, now or later.
        journal: what is durable.
        actions: the lifecycle's actions.
        profiles: works on a profile that the server asked for, while every line rests.
        stop: set by whoever wants the agent to end; a running job is ended then.
        idle: what else is done while every line rests.
    """

    def __init__(
        self,
        config: Config,
        transport: Transport,
        journal: Journal,
        actions: Actions,
        profiles: ProfileWorker,
        stop: threading.Event,
        idle: Sequence[IdleWork] = (),
    ) -> None:
        self._config = config
        self._transport = transport
        self._journal = journal
        self._actions = actions
        self._profiles = profiles
        self._stop = stop
        self._idle = (profiles, *idle)
        self._published: Reported | None = None
        self._heard: Desired | None = None
        self._waiting: Desired | None = None
        self._locks = HeldLocks(journal)
        self._adoption = Adoption(config, journal, self._locks, profiles, self._on_wish)
        self._retry_at: dict[str, float] = {}
        self._quiet = RateLimited(_LOG, every_s=60.0)
        self._inspect_at = 0.0
        self._uninspected: list[str] = []
        self._troubles: dict[str, ErrorReport] = {}

    def run(self) -> None:
        """Work until ``stop`` is set."""
        try:
            while not self._stop.is_set():
                self.tick(TICK_S)
        finally:
            self._pause()

    def run_until_settled(self, timeout_s: float, quiet_s: float = 0.0) -> Reported:
        """Work until the server's wish has been heard and every line rests; returns the last report.

        What is heard first is what the broker retained. If that changes nothing for any line, a server that is just
        about to say something newer gets ``quiet_s`` to do so. A profile that was asked for, or a tuning that is due,
        is worked on for what is left of the time, and goes on at the next start.

        Raises:
            NetworkError: the server's wish was not heard, or a line could not go on, within the time.
            StateError: the same, because the disk cannot be written to.
        """
        before = self._journal.lines()
        deadline = time.monotonic() + timeout_s
        try:
            while not self._stop.is_set() and not (self._is_settled() and not self._has_idle_work()):
                if time.monotonic() > deadline:
                    if self._is_settled():
                        break
                    raise self._not_settled(timeout_s)
                self.tick(TICK_S)
                if self._is_settled():
                    self._wait_for_news(before, quiet_s)
        finally:
            self._pause()
        self._publish()
        return self._report()

    def tick(self, wait_s: float) -> None:
        """Take a new wish if there is one within ``wait_s``, then work on what is due, and report changes."""
        if time.monotonic() >= self._inspect_at:
            self._inspect()
        self._listen(0.0 if self._due() else wait_s)
        with self._enduring(_DEVICE):
            if self._rests() and not self._wish_is_due():  # a tuning has its line's lock, and a wish needs it
                for work in self._idle:
                    work.go_on()
            else:
                self._pause()
        self._publish()
        for line in self._due():
            with self._enduring(line), self._locks.holding(line) as held:
                if held:
                    self._work(line)
                else:
                    self._retry_at[line] = time.monotonic() + TICK_S
        self._publish()

    def bring_in(self, line: str, target: str) -> LineState:
        """Work on a target that a person brings, until the line rests or cannot go on now; it counts as a wish.

        A tuning of the line makes way for it.

        Raises:
            StateError: another process works on the line.
        """
        with self._locks.first(line):
            self._journal.write_line(line, imported(self._journal.line(line), target))
            self._work(line)
        return self._journal.line(line).state

    def _has_idle_work(self) -> bool:
        return any(work.is_open() for work in self._idle)

    def _pause(self) -> None:
        """Interrupt what is done in idle hours only."""
        for work in self._idle:
            work.pause()

    def _inspect(self) -> None:
        """Look whether every resting line still has what it serves, and clear away what killed processes left."""
        if not self._uninspected:  # else only what was held by others: nothing is interrupted for that every minute
            self._uninspected = list(self._config.lines)
            with self._enduring(_DEVICE):
                self._pause()
                self._journal.sweep()
                sweep(self._config.device.state_dir / PINNED_ROOT.parent)
        for line in tuple(self._uninspected):
            with self._enduring(line), self._locks.holding(line) as held:
                if held:
                    self._inspect_line(line)
                    self._uninspected.remove(line)
        self._inspect_at = time.monotonic() + (INSPECT_AGAIN_S if self._uninspected else INSPECT_EVERY_S)

    def _inspect_line(self, line: str) -> None:
        record, slots = self._journal.line(line), LineSlots(self._config.device.state_dir, line)
        self._journal.sweep(line)
        slots.sweep()
        if record.state.phase not in RESTING:
            return
        if record.state.phase == "rejected":
            self._actions.discard(line, record)
        told = inspected(record, slots, self._config.lines[line], self._actions.check_seal)
        if told is not record:
            self._journal.write_line(line, told)
            self._tell(line, told)
            self._publish()

    @contextmanager
    def _enduring(self, line: str) -> Iterator[None]:
        """A disk that cannot be written to, or a record that cannot be read, does not end the agent.

        The line waits, and the report says why.
        """
        try:
            yield
        except UnreadError as error:
            self._retry_at[line] = time.monotonic() + self._config.limits.retry_wait_s
            self._quiet.warning("%s: %s", line, error)
        except OSError as error:
            self._retry_at[line] = time.monotonic() + self._config.limits.retry_wait_s
            trouble = ErrorReport(StateError.__name__, ExitCode.STATE, f"the agent waits for its disk: {error}")
            if self._troubles.get(line) != trouble:
                _LOG.error("%s: %s", line, trouble.message)
            self._troubles[line] = trouble
        else:
            self._troubles.pop(line, None)

    def _wait_for_news(self, before: Mapping[str, LineRecord], quiet_s: float) -> None:
        """Go on for ``quiet_s`` or until a line is no longer as ``before``; the same wish may come more than once."""
        deadline = time.monotonic() + quiet_s
        while self._journal.lines() == before and not self._stop.is_set():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            self.tick(left_s)

    def _listen(self, wait_s: float) -> None:
        desired = self._transport.next_desired(wait_s)
        if desired is not None:
            self._heard = self._waiting = desired
            self._retry_at.pop(_WISH, None)
        if self._waiting is not None and self._wish_is_due():
            with self._enduring(_WISH):
                outcome = self._adoption.adopt(self._waiting)
                if outcome == "taken":
                    self._waiting = None
                elif outcome == "unread":  # other work goes on meanwhile
                    self._retry_at[_WISH] = time.monotonic() + self._config.limits.retry_wait_s

    def _wish_is_due(self) -> bool:
        return self._waiting is not None and self._retry_at.get(_WISH, 0.0) <= time.monotonic()

    def _on_wish(self, line: str, record: LineRecord) -> None:
        self._retry_at.pop(line, None)
        self._tell(line, record)

    def _due(self) -> list[str]:
        now = time.monotonic()
        working = [line for line, record in self._journal.lines().items() if record.state.phase not in RESTING]
        return [line for line in working if self._retry_at.get(line, 0.0) <= now]

    def _rests(self) -> bool:
        return all(record.state.phase in RESTING for record in self._journal.lines().values())

    def _is_settled(self) -> bool:
        return self._heard is not None and self._waiting is None and self._rests()

    def _work(self, line: str) -> None:
        """Drive one line until it rests, has to wait, or something newer is wanted."""
        record = self._journal.line(line)
        action = resume(record.state.phase)
        while action not in ("none", "wait") and not self._stop.is_set():
            try:
                event, record = self._do(action, line, record)
            except JobCancelledError:
                self._journal.write_line(line, record)  # ended on purpose: not one of the attempts
                return
            step = advance(record.state.phase, event)
            action = step.action
            record = _replace(record, state=_replace(record.state, phase=step.phase), attempts=0)
            if record.damaged and (action == "wait" or step.phase == "rejected"):
                slots = LineSlots(self._config.device.state_dir, line)
                record = fallen_back(record, slots, self._actions.check_seal)
            self._journal.write_line(line, record)
            if action == "discard":
                self._actions.discard(line, record)
                action = "none"
            if action == "wait":
                self._retry_at[line] = time.monotonic() + self._config.limits.retry_wait_s
                self._quiet.warning("line=%s phase=%s waits: %s", line, record.state.phase, _error_text(record))
            else:
                self._tell(line, record)
            self._publish()
            if action != "none":
                self._listen(0.0)
                newest = self._journal.line(line)
                if newest != record:
                    record, action = newest, resume(newest.state.phase)

    def _do(self, action: Action, line: str, record: LineRecord) -> tuple[Event, LineRecord]:
        """One action, counted in the journal first: an action that takes the whole process down is not repeated
        for ever."""
        if action in _UNCOUNTED:
            return self._actions.run(action, line, record)
        if record.attempts >= MAX_ATTEMPTS:
            error = StateError(
                f"line '{line}' was given up while {record.state.phase}",
                why=f"the agent ended {record.attempts} times in this phase without finishing it",
                next_step="see the system's log for what ended it (out of memory, power), then retry the rollout",
            )
            return "refused", with_error(record, error)
        self._journal.write_line(line, _replace(record, attempts=record.attempts + 1))
        return self._actions.run(action, line, record)

    def _tell(self, line: str, record: LineRecord) -> None:
        state = record.state
        body = {"line": line, "phase": state.phase, "target": state.target, "generation": record.generation}
        if state.error is not None:
            body |= {"error": state.error.kind, "message": state.error.message}
        _LOG.info(" ".join(f"{key}={value}" for key, value in body.items()))
        try:
            self._transport.publish_event(state.phase, body)
        except NetworkError as error:
            _LOG.warning("the event was not sent: %s", error)

    def _report(self) -> Reported:
        report = build_report(self._config.device.id, self._config.lines, self._journal)
        trouble = next(iter(self._troubles.values()), None)  # not in the journal: that cannot be written
        if trouble is None:
            return report
        return _replace(report, lines={line: _replace(state, error=trouble) for line, state in report.lines.items()})

    def _publish(self) -> None:
        try:
            report = self._report()
        except UnreadError as error:  # of the device or its profile: nothing true can be said now
            self._quiet.warning("the state was not sent: %s", error)
            return
        # The resident size moves all the time; alone it is no news.
        if (
            self._published is None
            or _replace(report, idle_rss_bytes=self._published.idle_rss_bytes) != self._published
        ):
            self._published = report
            try:
                self._transport.publish_state(report)
            except NetworkError as error:
                _LOG.error("the state was not sent: %s", error)

    def _not_settled(self, timeout_s: float) -> KiridashiError:
        if self._heard is None:
            return NetworkError(
                f"no desired state for device '{self._config.device.id}' came within {timeout_s:g} s",
                why="the server has not published one, or is not connected to this broker",
                next_step="check that a version is wanted for this device's line (kiridashi line list)",
            )
        for trouble in self._troubles.values():
            return StateError(
                f"the desired state was not reached within {timeout_s:g} s",
                why=trouble.message,
                next_step="make room on the disk (kiridashi-agent doctor); the agent goes on where it stopped",
            )
        for line, record in self._journal.lines().items():
            if record.unread:
                return StateError(f"what is wanted of line '{line}' could not be taken", why=_error_text(record))
        waiting = {line: record for line, record in self._journal.lines().items() if record.state.phase not in RESTING}
        text = "; ".join(f"{line} is {r.state.phase}: {_error_text(r)}" for line, r in waiting.items())
        return NetworkError(
            f"the desired state was not reached within {timeout_s:g} s",
            why=text,
            next_step="run kiridashi-agent run --once again: it goes on where it stopped",
        )


def _error_text(record: LineRecord) -> str:
    return record.state.error.message if record.state.error else "no error was noted"
