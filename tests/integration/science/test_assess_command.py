"""``kiridashi bank assess`` from end to end, with the real backbone at a small size."""

import json

import pytest
from kiridashi import command
from kiridashi.errors import ExitCode
from kiridashi_server.bank.assessments import AssessmentStore
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli import assess, bank
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import make_record, tiny_samples

SIZE = "32"


@pytest.fixture
def run(capsys):
    """Run one bank command with ``--json``; gives the exit code and the data."""

    def call(*arguments):
        commands = (*bank.COMMANDS, *assess.COMMANDS)
        code = command.main("kiridashi", "", commands, ["bank", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def test_tasks_are_assessed_shown_used_and_forgotten(run, tmp_path):
    place = ("--bank", tmp_path / "bank", "--image-size", SIZE)
    tasks = []
    for number in range(3):
        splits = {"train": tiny_samples(6, 10 * number), "val": tiny_samples(3, 10 * number + 1)}
        save_task_folder(Task(f"hues-{number}", ("red", "green", "blue"), splits), tmp_path / f"hues-{number}")
        tasks += ["--task", tmp_path / f"hues-{number}"]
    assert run("learn", *tasks, "--iterations", 1, *place)[0] == ExitCode.OK

    one = ("assess", *tasks[:2], "--per-class", 2, "--iterations", 1, "--keep", 0.5, *place)
    code, data = run(*one)
    assert (code, [row["task"] for row in data["tasks"]]) == (0, ["hues-0"])
    assert (data["choice"]["measure"], data["tasks_needed"], data["coverage"]) == ("uniform", 9, None)
    (row,) = data["tasks"]
    assert len(row["utilities"]) == 2
    assert 0 <= row["own"] <= 1
    assert run(*one)[1] == data

    code, evidence = run("similar", *tasks[:2], "--per-class", 2, "--measure", "knn", *place)
    assert (code, evidence["measure"]) == (0, "knn")
    assert "1 of the bank's tasks are assessed" in evidence["reason"]

    record_id = run("forget", "hues-0", "--bank", tmp_path / "bank")[1]["id"]
    assert record_id
    assert AssessmentStore(tmp_path / "bank").list() == ()


def test_without_a_bank_or_other_tasks_nothing_is_measured(run, tmp_path):
    code, data = run("assess", "--task", "hands-a", "--bank", tmp_path / "nowhere", "--image-size", SIZE)
    assert (code, "no bank" in data["error"]["what"]) == (ExitCode.INPUT, True)
    with Bank.open(tmp_path / "bank") as bank_of_others:
        bank_of_others.add(make_record())
    code, data = run("assess", "--task", "hands-a", "--bank", tmp_path / "bank", "--image-size", SIZE)
    assert (code, "cannot be assessed" in data["error"]["what"]) == (ExitCode.INPUT, True)
    code, data = run("assess", "--keep", 2, "--bank", tmp_path / "bank")
    assert (code, "out of range" in data["error"]["what"]) == (ExitCode.INPUT, True)
