"""How both command-line programs answer: outcome, error, defect, interruption."""

import argparse
import errno
import json

import pytest
from kiridashi.command import Command, Outcome, main
from kiridashi.errors import BudgetError, ExitCode, InputError, KiridashiError, MissingExtraError


def fail(arguments: argparse.Namespace) -> Outcome:
    raise BudgetError("it does not fit", why="memory binds", next_step="ask for more")


def crash(arguments: argparse.Namespace) -> Outcome:
    raise ZeroDivisionError("ours")


def stop(arguments: argparse.Namespace) -> Outcome:
    raise KeyboardInterrupt


def refuse(arguments: argparse.Namespace) -> Outcome:
    raise PermissionError(errno.EACCES, "Permission denied", "/root/request.json")


def need(arguments: argparse.Namespace) -> Outcome:
    raise ModuleNotFoundError("no module", name="sqlalchemy.orm")


def need_ours(arguments: argparse.Namespace) -> Outcome:
    raise ModuleNotFoundError("no module", name="kiridashi_server.fleet")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=1)


COMMANDS = [
    Command("show", "show", configure, lambda a: Outcome({"size": a.size}, f"size {a.size}")),
    Command("fleet list", "list", configure, lambda a: Outcome({}, "no devices", ExitCode.STATE)),
    Command("fail", "fail", configure, fail),
    Command("crash", "crash", configure, crash),
    Command("stop", "stop", configure, stop),
    Command("refuse", "refuse", configure, refuse),
    Command("need", "need", configure, need),
    Command("need-ours", "need-ours", configure, need_ours),
]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main("tool", "A tool.", COMMANDS, argv, extra="server")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text_for_people_and_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "show", "--size", "3") == (0, "size 3\n", "")
    code, out, _ = run(capsys, "show", "--json")
    assert (code, json.loads(out)) == (0, {"size": 1})


def test_families_of_commands_and_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "fleet", "list")[:2] == (ExitCode.STATE, "no devices\n")


def test_an_error_says_what_why_and_what_next(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fail", "--json")
    assert code == ExitCode.BUDGET
    assert err == "error: it does not fit\n  why:  memory binds\n  next: ask for more\n"
    assert json.loads(out)["error"]["code"] == ExitCode.BUDGET


def test_a_defect_is_shown_whole_and_an_interruption_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "crash")
    assert code == ExitCode.INTERNAL
    assert "ZeroDivisionError" in err
    code, _, err = run(capsys, "stop")
    assert code == ExitCode.INTERRUPTED
    assert "Traceback" not in err


def test_a_path_that_this_account_cannot_use_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "refuse", "--json")
    assert (code, json.loads(out)["error"]["what"]) == (ExitCode.STATE, "/root/request.json cannot be used")
    assert "Traceback" not in err
    assert "whose it is" in err


def test_a_library_that_is_not_installed_is_named_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "need", "--json")
    assert code == ExitCode.USAGE
    assert "Traceback" not in err
    error = json.loads(out)["error"]
    assert (error["kind"], error["next"]) == ("MissingExtraError", "pip install 'kiridashi[server]'")
    assert "sqlalchemy" in error["what"]
    assert run(capsys, "need-ours")[0] == ExitCode.INTERNAL  # a module of our own that is gone is a defect


def test_a_wrong_flag_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        main("tool", "A tool.", COMMANDS, ["show", "--sise", "3"])
    assert caught.value.code == ExitCode.USAGE


def test_every_error_class_has_a_code_that_is_not_success() -> None:
    def family(kind: type[KiridashiError]) -> list[type[KiridashiError]]:
        return [kind, *(c for child in kind.__subclasses__() for c in family(child))]

    assert all(kind.exit_code != ExitCode.OK for kind in family(KiridashiError))
    assert "kiridashi[device]" in MissingExtraError.for_extra("tuf", "device").next_step
    assert str(InputError("what", why="why")) == "what: why"


def test_no_text_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    told = Command("told", "told", lambda _parser: None, lambda _arguments: Outcome({}, "a\x1b[2J\x9bb\tc\nd"))
    assert main("tool", "A tool.", [told], ["told"], extra="server") == 0
    assert capsys.readouterr().out == "a\ufffd[2J\ufffdb\tc\nd\n"
