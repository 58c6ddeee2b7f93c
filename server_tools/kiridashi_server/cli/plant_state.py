"""The ``--state`` argument that all fleet commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kiridashi.errors import InputError
from kiridashi.messages import check_name

if TYPE_CHECKING:
    from kiridashi_server.fleet.server import PlantServer

STATE_VARIABLE = "KIRIDASHI_SERVER_STATE"
DEFAULT_STATE = Path("kiridashi-server")


def add_state_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--state``."""
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(os.environ.get(STATE_VARIABLE) or DEFAULT_STATE),
        metavar="DIR",
        help=f"folder of the plant server (default: ${STATE_VARIABLE}, else ./{DEFAULT_STATE})",
    )


@contextmanager
def opened_server(arguments: argparse.Namespace) -> Iterator[PlantServer]:
    """The plant server of ``--state``, closed at the end.

    Raises:
        StateError: there is none, or it is damaged.
    """
    from kiridashi_server.fleet.server import PlantServer  # slow to import: only commands that need it pay

    server = PlantServer.open(arguments.state)
    try:
        yield server
    finally:
        server.close()


def parse_lines(text: str) -> list[str]:
    """Read ``press-3,press-4`` into names without repetition.

    Raises:
        InputError: no name, or an unsafe one.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError("no line is named", next_step="name lines as in --lines press-3,press-4")
    return [check_name(name, "line") for name in names]
