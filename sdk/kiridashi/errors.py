"""One error base for the whole product, and the documented list of exit codes.

An error says what happened, why, and what to do next; the command-line programs print the three
lines and leave with the class's exit code.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``kiridashi`` and ``kiridashi-agent``; documented in ``docs/reference/exit-codes.md``."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    INPUT = 10
    MODEL = 11
    BUDGET = 20
    BUNDLE = 30
    TRUST = 31
    NETWORK = 40
    RUNTIME = 50
    MEASURE = 51
    TUNE = 52
    STATE = 60
    INTERRUPTED = 130


class KiridashiError(Exception):
    """Base of every error that Kiridashi raises on purpose.

    Args:
        what: what happened, in one sentence, naming the file, topic or device.
        why: the cause, as far as it is known.
        next_step: what the reader can do now; usually a command.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, *, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        return ": ".join(part for part in (self.what, self.why) if part)

    def diagnostics(self) -> str:
        """The message for a terminal: what happened, why, and what to do next, a line each."""
        lines = [f"error: {self.what}"]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.why, self.next_step))


def _rebuild(cls: type[KiridashiError], what: str, why: str, next_step: str) -> KiridashiError:
    return cls(what, why=why, next_step=next_step)


class InputError(KiridashiError):
    """A file, folder or argument of the user's cannot be used."""

    exit_code = ExitCode.INPUT


class BudgetError(KiridashiError):
    """No model fits the budget, or the budget's text cannot be read."""

    exit_code = ExitCode.BUDGET


class BundleError(KiridashiError):
    """A bundle or artifact is incomplete, malformed or not what its manifest says."""

    exit_code = ExitCode.BUNDLE


class TrustError(KiridashiError):
    """A signature, digest, version or expiry check failed; nothing of it was used."""

    exit_code = ExitCode.TRUST


class NetworkError(KiridashiError):
    """The broker or the other side cannot be reached, or refused."""

    exit_code = ExitCode.NETWORK


class RuntimeUnavailableError(KiridashiError):
    """This device lacks the inference runtime that an artifact needs."""

    exit_code = ExitCode.RUNTIME


class StateError(KiridashiError):
    """A state folder, slot or journal is missing or damaged."""

    exit_code = ExitCode.STATE


class BusyError(KiridashiError):
    """More work is waiting than was allowed for; the same call may succeed later."""

    exit_code = ExitCode.STATE


class MissingExtraError(KiridashiError):
    """An optional library is needed for this call; the message names the extra to install."""

    exit_code = ExitCode.USAGE

    @classmethod
    def for_extra(cls, library: str, extra: str) -> MissingExtraError:
        """The error for ``library``, which comes with ``kiridashi[extra]``."""
        return cls(
            f"the library '{library}' is not installed",
            why=f"it belongs to the optional part '{extra}'",
            next_step=f"pip install 'kiridashi[{extra}]'",
        )
