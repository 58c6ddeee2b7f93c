"""The resident's side of the drift watch: when to look, and telling what was found. No numpy here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
from kiridashi.config import Config
from kiridashi.drift.report import LineDrift
from kiridashi.drift.rows import RowFolder
from kiridashi.errors import KiridashiError, NetworkError

from kiridashi_agent.background import Background
from kiridashi_agent.jobs import WATCH_LIMITS, WatchOutcome, WatchRequest
from kiridashi_agent.journal import Journal
from kiridashi_agent.process import JobCancelledError, Limits

_LOG = logging.getLogger(__name__)
WATCH_LOCK = "drift-watch"
EVENT = "drift"


class Watch(Protocol):
    """Moves the watches on; see :func:`kiridashi_agent.jobs.watch`."""

    def __call__(self, request: WatchRequest, limits: Limits) -> WatchOutcome:
        """Blocks until the child has ended."""


class Publish(Protocol):
    """Sends an event; see :meth:`kiridashi_agent.transport.Transport.publish_event`."""

    def __call__(self, name: str, body: Mapping[str, Any]) -> None:
        """Returns before the event has arrived."""


class DriftWatcher:
    """Looks after the lines now and then, with one child for all; see :class:`~kiridashi_agent.background.IdleWork`."""

    def __init__(self, config: Config, journal: Journal, watch: Watch, publish: Publish) -> None:
        self._config, self._journal = config, journal
        self._watch, self._publish = watch, publish
        self._background = Background("kiridashi-watch")
        self._due = 0.0

    def go_on(self) -> None:
        """Begin to look if it is time and a line has noted something."""
        now = time.monotonic()
        if now < self._due or self._background.is_running():
            return
        self.pause()
        self._due = now + self._config.limits.watch_every_s
        lines = watched_lines(self._config)
        if any(RowFolder(self._config.device.state_dir, line).names() for line in lines):
            self._background.start(partial(self._look, lines))

    def pause(self) -> None:
        """Interrupt a look that is under way; it is made up for later."""
        self._background.stop()

    def is_open(self) -> bool:
        """Never: there is always a next look, and nobody waits for it."""
        return False

    def _look(self, lines: Mapping[str, int], cancel: threading.Event) -> None:
        limits = Limits(WATCH_LIMITS.seconds, WATCH_LIMITS.memory_bytes, cancel)
        try:
            state_dir = self._config.device.state_dir
            # A wait for the lock could not be interrupted, and the agent's loop waits for this thread.
            look(state_dir, self._journal, lines, self._watch, self._publish, limits, wait=False)
        except JobCancelledError:
            self._due = 0.0
        except (KiridashiError, OSError) as error:
            _LOG.error("the drift watch failed, and is tried again later: %s", error)


def watched_lines(config: Config) -> dict[str, int]:
    """The lines that are watched, each with the frames that its reference takes."""
    return {line: section.reference_frames for line, section in config.lines.items() if section.watch}


def look(
    state_dir: Path,
    journal: Journal,
    lines: Mapping[str, int],
    watch: Watch,
    publish: Publish | None,
    limits: Limits = WATCH_LIMITS,
    *,
    wait: bool = True,
) -> WatchOutcome:
    """Move the watches on by one child process, note what they say, and tell what is new.

    Without ``publish`` nobody is told here: a running agent reports what the journal says.

    Raises:
        StateError: another process does it, and ``wait`` is false.
        JobError: the child crashed, hung, was stopped or reached its memory limit; it is as if it had not run.
    """
    with journal.lock(WATCH_LOCK, wait=wait):
        outcome = watch(WatchRequest(str(state_dir), dict(lines)), limits)
        for line, drift in outcome.lines.items():
            before = journal.drift().get(line)
            for finding in drift.findings[_told(before, drift) :]:
                _LOG.warning("line=%s drift: %s", line, finding.text)
                if publish is not None:
                    _send(publish, {"line": line, "model": drift.model_digest, **msgspec.to_builtins(finding)})
            if drift != before:
                journal.write_drift(line, drift)
        for line, why in outcome.failed.items():
            _LOG.error("line=%s the drift watch cannot look: %s", line, why)
    return outcome


def _send(publish: Publish, body: Mapping[str, Any]) -> None:
    try:
        publish(EVENT, body)
    except NetworkError as error:
        _LOG.warning("the event was not sent: %s", error)


def _told(before: LineDrift | None, drift: LineDrift) -> int:
    """How many findings were told already; they only grow while the model is the same."""
    if before is None or before.findings != drift.findings[: len(before.findings)]:
        return 0
    return len(before.findings)
