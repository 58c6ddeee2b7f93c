"""The ``kiridashi-agent`` command: the device's side, one file per command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kiridashi import command

_MODULES = ("enroll", "run", "import", "measure", "predict", "label", "tune", "drift", "undo", "status", "doctor")
_FILES = {"import": "usb"}  # a word of the language's own cannot name a module


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``kiridashi-agent``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The agent runs for months: of the program it loads its own command only.
    names = arguments[:1] if arguments[:1] and arguments[0] in _MODULES else _MODULES
    description = "The device's agent: take a line's model, check it, measure it here, tune it, and activate it."
    modules = [f"kiridashi_agent.cli.{_FILES.get(name, name)}" for name in names]
    return command.main_of("kiridashi-agent", description, modules, arguments, extra="device")
