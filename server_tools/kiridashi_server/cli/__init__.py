"""The ``kiridashi`` command: server tools, one file per command."""

from __future__ import annotations

from collections.abc import Sequence

from kiridashi import command

_MODULES = ("quickstart", "bank", "stock", "cut", "front", "publish", "profile", "line", "fleet", "serve", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``kiridashi``; returns the exit code."""
    return command.main_of(
        "kiridashi",
        "One backbone, many lines: learn scores, cut models to a budget, publish them to devices.",
        [f"kiridashi_server.cli.{name}" for name in _MODULES],
        argv,
        extra="server",
    )
