"""Log lines for a service: one line each on standard error, ``time level module key facts``."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str) -> None:
    """Send all log lines of ``level`` and above to standard error; for the process's entry point only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class _OneLine(logging.Formatter):
    """Keeps a record, traceback included, on one line, so that nobody else can write a line of their own."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


class RateLimited:
    """Warnings that may come many times a minute, for weeks: the first at once, then at intervals that double, counted.

    Args:
        log: where they go.
        every_s: the first interval; again once a warning has not come for twice its interval.
        most_s: the longest.
    """

    def __init__(self, log: logging.Logger, every_s: float, most_s: float = 3600.0) -> None:
        self._log = log
        self._every_s = every_s
        self._most_s = max(every_s, most_s)
        self._told: dict[str, _Told] = {}

    def warning(self, message: str, *arguments: object) -> None:
        """Log, or count, one warning; warnings are the same when their message template is."""
        now = time.monotonic()
        told = self._told.get(message)
        if told is not None and now - told.at < told.interval_s:
            told.held_back += 1
            return
        again = told is not None and now - told.at < 2 * told.interval_s
        interval_s = min(self._most_s, 2 * told.interval_s) if told is not None and again else self._every_s
        suffix = f" ({told.held_back} more of these before)" if told is not None and told.held_back else ""
        self._told[message] = _Told(now, interval_s)
        self._log.warning(message + suffix, *arguments)


@dataclass
class _Told:
    """When a warning was logged, for how long it is now only counted, and the count."""

    at: float
    interval_s: float
    held_back: int = 0
