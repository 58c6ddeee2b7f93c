"""``kiridashi bank`` from end to end on a small task folder, with the real backbone at a small size."""

import json
import subprocess
import sys

import pytest
from kiridashi import command
from kiridashi.errors import ExitCode
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli.bank import COMMANDS
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import tiny_samples

SIZE = "32"


@pytest.fixture
def run(capsys):
    """Run one bank command with ``--json``; gives the exit code, the data, and what was written to standard error."""

    def call(*arguments):
        code = command.main("kiridashi", "", COMMANDS, ["bank", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


@pytest.fixture
def task_folder(tmp_path):
    splits = {"train": tiny_samples(6, 0), "val": tiny_samples(3, 1), "test": tiny_samples(3, 2)}
    save_task_folder(Task("hues", ("red", "green", "blue"), splits), tmp_path / "hues")
    return tmp_path / "hues"


def test_learn_list_show_similar_verify_forget(run, tmp_path, task_folder):
    place = ("--bank", tmp_path / "bank")
    learn = ("learn", "--task", task_folder, "--iterations", 1, "--image-size", SIZE, *place)
    code, data, _ = run(*learn)
    assert (code, data["records"][0]["task"], data["records"][0]["new"]) == (0, "hues", True)
    code, again, _ = run(*learn)
    assert (code, again["records"][0]["new"]) == (0, False)
    assert again["records"][0]["id"] == data["records"][0]["id"]

    assert [row["task"] for row in run("list", *place)[1]["records"]] == ["hues"]
    shown = run("show", data["records"][0]["id"][:10], *place)[1]
    assert shown["labels"] == ["blue", "green", "red"]
    assert shown["provenance"]["settings"]["iterations"] == 1

    code, evidence, _ = run("similar", "--task", task_folder, "--per-class", 4, "--image-size", SIZE, *place)
    assert (code, evidence["verdict"], evidence["items"][0]["task"]) == (0, "blend", "hues")

    code, found, _ = run("verify", *place)
    assert (code, found["records"], found["faults"]) == (0, 1, [])
    assert run("forget", "hues", *place)[1]["id"] == data["records"][0]["id"]
    assert run("list", *place)[1]["records"] == []


def test_damage_has_its_own_exit_code(run, tmp_path):
    with Bank.open(tmp_path / "bank") as bank:
        from tiny_science import make_record

        bank.add(make_record())
    next(path for path in (tmp_path / "bank" / "blobs").rglob("*") if path.is_file()).write_bytes(b"")
    code, found, _ = run("verify", "--bank", tmp_path / "bank")
    assert code == ExitCode.STATE
    assert len(found["faults"]) == 1
    code, data, err = run("show", "hues", "--bank", tmp_path / "bank")
    assert (code, data["error"]["kind"]) == (ExitCode.STATE, "BankDamagedError")
    assert "kiridashi bank forget" in err


@pytest.mark.parametrize(
    "arguments",
    [("list",), ("show", "x"), ("verify",), ("forget", "x"), ("similar", "--task", "hands-a")],
)
def test_without_a_bank_nothing_is_made(run, tmp_path, arguments):
    code, data, _ = run(*arguments, "--bank", tmp_path / "nowhere")
    assert code == ExitCode.INPUT
    assert "no bank" in data["error"]["what"]
    assert not (tmp_path / "nowhere").exists()


def test_a_task_that_cannot_be_read_is_refused_before_anything_is_learnt(run, tmp_path, task_folder):
    code, data, _ = run(
        "learn", "--task", task_folder, "--task", "nonsense", "--image-size", SIZE, "--bank", tmp_path / "bank"
    )
    assert code == ExitCode.INPUT
    assert "nonsense" in data["error"]["what"]
    assert not (tmp_path / "bank").exists()


def test_looking_at_a_bank_does_not_load_torch(tmp_path):
    with Bank.open(tmp_path / "bank"):
        pass
    script = (
        "import sys; from kiridashi.command import main; from kiridashi_server.cli.bank import COMMANDS; "
        f"code = main('kiridashi', '', COMMANDS, ['bank', 'list', '--bank', {str(tmp_path / 'bank')!r}]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
