"""Taking what the server wants: made durable line by line, under each line's lock."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from kiridashi.config import Config
from kiridashi.errors import StateError
from kiridashi.messages import Desired, LineDesired
from kiridashi.slots import POINTER_NAME

from kiridashi_agent.journal import MAX_STRANGERS, DeviceRecord, Journal, LineRecord, UnreadError
from kiridashi_agent.logs import RateLimited
from kiridashi_agent.profile_worker import ProfileWorker
from kiridashi_agent.wishes import adopted

_LOG = logging.getLogger(__name__)
Outcome = Literal["taken", "held", "unread"]
"""Whether a wish was taken whole; else that another process works on one of its lines, or a record cannot be read."""


class HeldLocks:
    """The locks of lines that this agent has."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._held: set[str] = set()

    @contextmanager
    def holding(self, line: str) -> Iterator[bool]:
        """The line's lock for the block, unless this agent has it already; ``False`` if another process has it."""
        with ExitStack() as stack:
            if line not in self._held:
                try:
                    stack.enter_context(self._journal.lock(line, wait=False))
                except StateError as error:
                    _LOG.debug("%s", error)
                else:
                    self._held.add(line)
                    stack.callback(self._held.remove, line)
            yield line in self._held

    @contextmanager
    def first(self, line: str) -> Iterator[None]:
        """The line's lock for the block, for which a tuning makes way. Raises StateError if it does not come free."""
        with self._journal.lock_first(line):
            self._held.add(line)
            yield
            self._held.remove(line)


class Adoption:
    """Takes wishes.

    Args:
        config: the device's settings.
        journal: what is durable.
        locks: those of the agent.
        profiles: takes the wish for a profile.
        changed: told of every line whose record has changed.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal,
        locks: HeldLocks,
        profiles: ProfileWorker,
        changed: Callable[[str, LineRecord], None],
    ) -> None:
        self._config, self._journal, self._locks, self._profiles = config, journal, locks, profiles
        self._changed = changed
        self._quiet = RateLimited(_LOG, every_s=60.0)

    def adopt(self, desired: Desired) -> Outcome:
        """Make the wish durable, line by line, before the generation says that it was taken.

        A line that cannot be taken now keeps no other from it; the wish has to be taken again later then.
        """
        known = self._journal.device().generation
        if desired.generation < known:
            _LOG.warning("desired generation %d is older than %d and was ignored", desired.generation, known)
            return "taken"
        lines = self._known_or_few(desired)
        outcomes = {self._taken(line, wanted, desired.generation) for line, wanted in lines.items()}
        self._prune(lines)
        self._profiles.adopt(desired.probes)
        if outcomes <= {"taken"} and desired.generation != known:
            self._journal.write_device(DeviceRecord(desired.generation))
        return "held" if "held" in outcomes else "unread" if "unread" in outcomes else "taken"

    def _known_or_few(self, desired: Desired) -> dict[str, LineDesired]:
        """What is wanted of the configured lines, and of as many others as the journal takes."""
        strangers = sorted(set(desired.lines) - set(self._config.lines))
        if len(strangers) > MAX_STRANGERS:
            _LOG.warning("models are wanted for %d lines that are not configured; some are ignored", len(strangers))
        return {line: wanted for line, wanted in desired.lines.items() if line not in strangers[MAX_STRANGERS:]}

    def _taken(self, line: str, wanted: LineDesired, generation: int) -> Outcome:
        configured = line in self._config.lines
        try:
            record = self._journal.line(line)
            if adopted(record, wanted, generation, configured=configured) is record:
                return "taken"
            with self._locks.holding(line) as held:
                if held:
                    changed = adopted(self._journal.line(line), wanted, generation, configured=configured)
                    self._journal.write_line(line, changed)
                    self._changed(line, changed)
                return "taken" if held else "held"
        except UnreadError as error:
            self._quiet.warning("line=%s what is wanted of it is taken later: %s", line, error)
            return "unread"

    def _prune(self, wanted: Collection[str]) -> None:
        """Forget lines that are neither configured nor wanted now and serve nothing, but for a few."""
        serving = {path.parent.name for path in self._config.device.state_dir.glob(f"lines/*/{POINTER_NAME}")}
        most = MAX_STRANGERS - len(set(wanted) - set(self._config.lines))
        for line in self._journal.prune({*self._config.lines, *wanted, *serving}, most):
            _LOG.info("line=%s is not configured and no longer wanted: its journal was taken away", line)
