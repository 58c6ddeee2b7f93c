"""The page of commands shows what ``--help`` prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kiridashi.line_command import run as line
from kiridashi_agent.cli import main as agent

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "commands.md"
PROGRAMS: dict[str, Callable[[list[str]], int]] = {"kiridashi-agent": agent, "kiridashi-line": line}


def blocks() -> dict[str, str]:
    """The text shown below the heading of every command of the two programs."""
    pattern = r"^### (kiridashi-[^\n]+)\n\n```text\n(.*?)```"
    return dict(re.findall(pattern, PAGE.read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse prints short and long options differently since 3.13")
def test_every_block_is_what_the_program_prints(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("KIRIDASHI_STATE", raising=False)
    shown = blocks()
    for heading, text in shown.items():
        program, *words = heading.split()
        with pytest.raises(SystemExit):
            PROGRAMS[program]([*words, "--help"])
        assert " ".join(capsys.readouterr().out.split()) == " ".join(text.split()), heading
    top = re.findall(r"^    (\w+) ", shown["kiridashi-agent"].partition("commands:")[2], re.MULTILINE)
    assert {heading.split()[1] for heading in shown if heading.startswith("kiridashi-agent ")} == set(top)
