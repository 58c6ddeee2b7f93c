"""How both command-line programs behave: one table of commands, ``--json``, documented exit codes.

A command is data: a name, help, a function that declares its arguments, and one that runs it and returns an
:class:`Outcome`. Standard output carries the outcome only; progress and errors go to standard error.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kiridashi.errors import ExitCode, KiridashiError, MissingExtraError, StateError

_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_PATH_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})


@dataclass(frozen=True)
class Outcome:
    """What a command found or did: ``data`` for ``--json``, ``text`` for people, and the exit code."""

    data: Mapping[str, Any]
    text: str = ""
    exit_code: ExitCode = ExitCode.OK


@dataclass(frozen=True)
class Command:
    """One command of a program. ``name`` may hold a space for a sub-command: ``"fleet enroll"``."""

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Outcome]


def main(
    prog: str, description: str, commands: Sequence[Command], argv: Sequence[str] | None = None, *, extra: str = ""
) -> int:
    """Parse, run one command, print its outcome, and return the exit code.

    A :class:`KiridashiError` is printed as its three lines, or with ``--json`` as an object ``{"error": …}`` on
    standard output. A library that is not installed belongs to the optional part ``extra`` and is reported as that; a
    disk that is full, read-only or broken, and a path that this account cannot use, are reported too.
    Anything else is a defect of ours and is printed with its traceback.
    """
    arguments = _parser(prog, description, commands).parse_args(argv)
    try:
        outcome: Outcome = arguments.command.run(arguments)
    except KiridashiError as error:
        return _report(error, as_json=arguments.json)
    except KeyboardInterrupt:
        _write(sys.stderr, "interrupted; the same command goes on where it stopped")
        return ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of defence: a defect is shown whole, with its own exit code
        known = _missing_extra(error, extra) or _disk_error(error)
        if known is not None:
            return _report(known, as_json=arguments.json)
        _write(sys.stderr, traceback.format_exc() + f"error: {prog} has a defect; please report the lines above")
        return ExitCode.INTERNAL
    text = json.dumps(outcome.data, indent=2, sort_keys=True) if arguments.json else outcome.text
    if text:
        _write(sys.stdout, text)
    return outcome.exit_code


def main_of(
    prog: str, description: str, modules: Sequence[str], argv: Sequence[str] | None = None, *, extra: str = ""
) -> int:
    """:func:`main` with the ``COMMANDS`` of some modules; a library that importing them needs is reported alike."""
    commands: list[Command] = []
    try:
        for module in modules:
            commands.extend(importlib.import_module(module).COMMANDS)
    except ModuleNotFoundError as error:
        missing = _missing_extra(error, extra)
        if missing is None:
            raise
        return _report(missing, as_json="--json" in (sys.argv if argv is None else argv))
    return main(prog, description, commands, argv, extra=extra)


def _missing_extra(error: Exception, extra: str) -> MissingExtraError | None:
    """The error that says how to install ``extra``, if ``error`` is that a library of others' is not there."""
    if not extra or not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    library = error.name.partition(".")[0]
    return None if library.startswith("kiridashi") else MissingExtraError.for_extra(library, extra)


def _disk_error(error: Exception) -> StateError | None:
    """The error for a disk that is full, read-only or broken, or a path that cannot be used, if ``error`` is that."""
    if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS | _PATH_ERRORS:
        return None
    where = error.filename or "a file"
    step = (
        "look at the disk: df -h, dmesg" if error.errno in _DISK_ERRORS else "look at the path, and whose it is: ls -l"
    )
    return StateError(f"{where} cannot be used", why=str(error), next_step=step)


def _report(error: KiridashiError, *, as_json: bool) -> int:
    """Print an error as :func:`main` does, and return its exit code."""
    _write(sys.stderr, error.diagnostics())
    if as_json:
        fields = {
            "kind": type(error).__name__,
            "code": int(error.exit_code),
            "what": error.what,
            "why": error.why,
            "next": error.next_step,
        }
        _write(sys.stdout, json.dumps({"error": fields}, indent=2, sort_keys=True))
    return error.exit_code


def _parser(prog: str, description: str, commands: Sequence[Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    top = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    families: dict[str, Any] = {}
    for command in commands:
        family, _, name = command.name.rpartition(" ")
        if family and family not in families:
            family_help = ", ".join(c.name.split()[-1] for c in commands if c.name.startswith(family + " "))
            family_parser = top.add_parser(family, help=family_help)
            families[family] = family_parser.add_subparsers(metavar="COMMAND", required=True)
        place = families[family] if family else top
        child = place.add_parser(name, help=command.help, description=command.help)
        command.configure(child)
        child.add_argument("--json", action="store_true", help="print the result as JSON")
        child.set_defaults(command=command)
    return parser


def _write(stream: Any, text: str) -> None:
    # Texts may come from devices, file names and models: none of them is to steer the terminal.
    stream.write(text.translate(_CONTROLS) + "\n")
    stream.flush()
