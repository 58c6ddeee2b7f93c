"""The program ``kiridashi-line`` from its first moment: loading its libraries takes longer than a finger on Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def run(argv: Sequence[str] | None = None) -> int:
    """Load the program and run it."""
    with loading():
        from kiridashi import line_command
    return line_command.run(argv)


@contextmanager
def loading() -> Iterator[None]:
    """Let Ctrl-C end the process as it does any other program: a library takes it for a failure of its own loading."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(run())
