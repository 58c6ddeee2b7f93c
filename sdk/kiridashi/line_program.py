"""The program ``kiridashi-line`` from its first moment: loading its libraries takes longer than a finger on Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def run(argv: Sequence[str] | None = None) -> int:
    """Load the program and run it. Until it is loaded, Ctrl-C ends the process as it does any other program."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kiridashi import line_command

    signal.signal(signal.SIGINT, before)
    return line_command.run(argv)


if __name__ == "__main__":
    sys.exit(run())
