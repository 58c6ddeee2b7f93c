"""The ``kiridashi`` command: server tools, one file per command."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from kiridashi import command

_MODULES = ("quickstart", "bank", "cut", "publish", "line", "fleet", "serve", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``kiridashi``; returns the exit code."""
    commands: list[command.Command] = []
    for name in _MODULES:
        commands.extend(importlib.import_module(f"kiridashi_server.cli.{name}").COMMANDS)
    return command.main(
        "kiridashi",
        "One backbone, many lines: learn scores, cut models to a budget, publish them to devices.",
        commands,
        argv,
    )
