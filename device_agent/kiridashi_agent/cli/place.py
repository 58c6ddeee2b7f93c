"""Arguments that several commands share: the state folder, a line."""

from __future__ import annotations

import argparse
from pathlib import Path

from kiridashi.config import CONFIG_NAME, Config, load_config
from kiridashi.errors import InputError
from kiridashi.slots import DEFAULT_STATE_DIR, STATE_VARIABLE, default_state_dir


def add_state_argument(parser: argparse.ArgumentParser) -> None:
    """``--state DIR``."""
    parser.add_argument(
        "--state",
        type=Path,
        default=default_state_dir(),
        metavar="DIR",
        help=f"the device's state folder (${STATE_VARIABLE}, else {DEFAULT_STATE_DIR})",
    )


def add_line_argument(parser: argparse.ArgumentParser) -> None:
    """``--line NAME``, required."""
    parser.add_argument("--line", required=True, metavar="NAME", help="the line's name")


def opened_config(arguments: argparse.Namespace) -> Config:
    """The configuration in the state folder. Raises as :func:`kiridashi.config.load_config`."""
    return load_config(arguments.state / CONFIG_NAME)


def configured_line(config: Config, line: str) -> str:
    """``line``, if the device is configured for it.

    Raises:
        InputError: it is not; names those that are.
    """
    if line not in config.lines:
        known = ", ".join(sorted(config.lines)) or "none"
        raise InputError(f"this device has no line '{line}'", why=f"configured lines: {known}")
    return line
