"""Log lines for a service: one line each on standard error, ``time level module key facts``."""

from __future__ import annotations

import logging
import sys
import time

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
    """Warnings that may come many times a minute: the first at once, then one per interval, with a count."""

    def __init__(self, log: logging.Logger, every_s: float) -> None:
        self._log = log
        self._every_s = every_s
        self._last: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def warning(self, message: str, *arguments: object) -> None:
        """Log, or count, one warning; warnings are the same when their message template is."""
        now = time.monotonic()
        if message in self._last and now - self._last[message] < self._every_s:
            self._held_back[message] = self._held_back.get(message, 0) + 1
            return
        self._last[message] = now
        held_back = self._held_back.pop(message, 0)
        suffix = f" ({held_back} more of these before)" if held_back else ""
        self._log.warning(message + suffix, *arguments)
