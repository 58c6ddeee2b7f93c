"""A device's profile named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from kiridashi.errors import InputError

if TYPE_CHECKING:
    from kiridashi_server.budget.profile import Profile

PROFILE_HELP = "a device's profile.json"


def read_profile(path: Path) -> Profile:
    """Read the profile.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    from kiridashi_server.budget.profile import Profile

    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a device profile",
            why=str(error),
            next_step="leave --profile out, or make one as docs/how-to/budgets.md says",
        ) from error
