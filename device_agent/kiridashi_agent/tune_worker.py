"""Tunes lines by itself when enough new frames were named, beside the agent's own loop and only while lines rest."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import partial

from kiridashi.config import Config
from kiridashi.errors import KiridashiError
from kiridashi.slots import LineSlots
from kiridashi.spool import SpoolFolder

from kiridashi_agent.background import Background
from kiridashi_agent.journal import Journal
from kiridashi_agent.process import JobCancelledError
from kiridashi_agent.retune import LineTuner, TuneWish, named_ids

_LOG = logging.getLogger(__name__)
RETRY_S = 60.0


class TuneWorker:
    """Runs one tuning at a time while the agent lets it; see :class:`~kiridashi_agent.background.IdleWork`."""

    def __init__(self, config: Config, journal: Journal, tuner: LineTuner) -> None:
        self._config, self._journal, self._tuner = config, journal, tuner
        self._background = Background("kiridashi-tune")
        self._settle_at = 0.0
        self._retry_at: dict[str, float] = {}
        self._answers: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {}

    def go_on(self) -> None:
        """Begin a tuning if one is due."""
        if self._background.is_running():
            return
        self.pause()
        if time.monotonic() >= self._settle_at:  # again and again: a tuning by hand may be killed beside this agent
            for line in self._config.lines:
                self._tuner.settle(line)
            self._settle_at = time.monotonic() + RETRY_S
        due = next((line for line in self._config.lines if self._is_due(line)), None)
        if due is not None:
            self._background.start(partial(self._tune, due))

    def is_open(self) -> bool:
        """Whether a tuning is under way or due."""
        return self._background.is_running() or any(self._is_due(line) for line in self._config.lines)

    def pause(self) -> None:
        """Interrupt a tuning."""
        self._background.stop()

    def _is_due(self, line: str) -> bool:
        section = self._config.lines[line]
        if not (section.tune and section.tune_after) or time.monotonic() < self._retry_at.get(line, 0.0):
            return False
        try:
            record = self._journal.tuning(line)
            if record is not None and record.is_to_be_repeated:
                return True
            if LineSlots(self._config.device.state_dir, line).active() is None:
                return False
            new = newly_named(self._named(line), record.answers if record else ())
        except KiridashiError as error:
            self._put_off(line, error)
            return False
        return new >= section.tune_after

    def _named(self, line: str) -> tuple[str, ...]:
        """The answers, read again only when their file has changed."""
        state = self._config.device.state_dir
        try:
            status = SpoolFolder(state, line).answers_path.stat()
        except OSError:
            return ()
        now = status.st_mtime_ns, status.st_size
        if line not in self._answers or self._answers[line][0] != now:
            self._answers[line] = now, named_ids(state, line)
        return self._answers[line][1]

    def _tune(self, line: str, cancel: threading.Event) -> None:
        try:
            self._tuner.tune(line, TuneWish("named"), cancel)
        except JobCancelledError:
            _LOG.info("line=%s the tuning makes way, and is done later", line)
        except (KiridashiError, OSError) as error:
            self._put_off(line, error)

    def _put_off(self, line: str, error: Exception) -> None:
        _LOG.warning("line=%s could not be tuned: %s", line, error)
        self._retry_at[line] = time.monotonic() + RETRY_S


def newly_named(answers: Sequence[str], known: Sequence[str]) -> int:
    """How many answers came after the newest known one that still holds; all, if none does. Pure."""
    places = [answers.index(answer) for answer in known if answer in answers]
    return len(answers) - 1 - max(places) if places else len(answers)
