"""Arguments that several commands share: the state folder, a line."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from kiridashi.config import CONFIG_NAME, Config, load_config
from kiridashi.errors import InputError, StateError
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


def check_account(state: Path) -> None:
    """Refuse to write into another account's state folder.

    Files of another account's would stop the agent, and root would follow whatever links that account has laid there.

    Raises:
        StateError, InputError: the state folder is another account's, or is not there.
    """
    step = f"name the device's state folder with --state or ${STATE_VARIABLE}"
    try:
        owner = state.stat()
    except OSError as error:
        raise InputError(f"the state folder {state} cannot be used", why=str(error), next_step=step) from error
    if not stat.S_ISDIR(owner.st_mode):
        raise InputError(f"the state folder {state} cannot be used", why="it is no folder", next_step=step)
    if owner.st_uid != os.geteuid():
        raise StateError(
            f"the state folder {state} belongs to another account",
            why=f"its user id is {owner.st_uid}, this process has {os.geteuid()}",
            next_step="run it as that account: sudo -u kiridashi kiridashi-agent …",
        )
