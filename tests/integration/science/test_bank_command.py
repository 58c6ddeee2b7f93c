"""``kiridashi bank`` from end to end on a small task folder, with the real backbone at a small size."""

import json
import subprocess
import sys

import pytest
from kiridashi import command
from kiridashi.errors import ExitCode
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli import bank as bank_commands
from kiridashi_server.cli import bank_sharing
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import make_record, tiny_samples

COMMANDS = (*bank_commands.COMMANDS, *bank_sharing.COMMANDS)

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


def test_share_records_between_two_banks(run, tmp_path):
    with Bank.open(tmp_path / "ours") as bank:
        bank.add(make_record())
    ours, theirs = ("--bank", tmp_path / "ours"), ("--bank", tmp_path / "theirs")
    archive = tmp_path / "shared"
    code, data, _ = run("export", archive, *ours)
    assert (code, "may be exported" in data["error"]["what"]) == (ExitCode.INPUT, True)
    assert run("policy", "hues", "shareable", *ours)[1]["policy"] == "shareable"
    code, sent, _ = run("export", archive, *ours)
    assert (code, len(sent["records"])) == (0, 1)
    assert (tmp_path / "ours" / "keys" / "export.pem").stat().st_mode & 0o777 == 0o600
    first = archive.read_bytes()
    assert run("export", archive, *ours)[0] == 0
    assert archive.read_bytes() == first

    code, data, _ = run("import", archive, "--trust", sent["public_key"], *theirs)
    assert (code, data["new"], data["new_backbones"]) == (0, sent["records"], ["backbone"])
    assert run("import", archive, "--trust", sent["public_key"], *theirs)[1]["known"] == sent["records"]
    assert run("list", *theirs)[1]["backbones"] == {"backbone": 1}
    assert run("list", "--task", "nothing", *theirs)[1]["records"] == []
    assert run("show", "hues", *theirs)[1]["provenance"]["origin"].startswith("imported, signed by")


def test_import_refuses_a_stranger_and_what_is_no_key(run, tmp_path):
    with Bank.open(tmp_path / "ours") as bank:
        bank.add(make_record(policy="shareable"))
    _, sent, _ = run("export", tmp_path / "shared", "--bank", tmp_path / "ours")
    with Bank.open(tmp_path / "stranger") as bank:
        bank.add(make_record(policy="shareable"))
    _, stranger, _ = run("export", tmp_path / "other", "--bank", tmp_path / "stranger")
    place = ("--bank", tmp_path / "theirs")
    code, data, _ = run("import", tmp_path / "shared", "--trust", stranger["public_key"], *place)
    assert (code, data["error"]["kind"]) == (ExitCode.TRUST, "TrustError")
    code, _, _ = run("import", tmp_path / "shared", "--trust", tmp_path / "shared", *place)
    assert code == ExitCode.INPUT
    assert run("import", tmp_path / "gone", "--trust", sent["public_key"], *place)[0] == ExitCode.INPUT
    assert run("list", *place)[1]["records"] == []


def test_add_a_model_and_carry_records_over(run, tmp_path, task_folder):
    import safetensors.torch
    from kiridashi_server.backbone import Backbone
    from kiridashi_server.graph.program import tensors_of, weight_names

    backbone = Backbone.load(image_size=int(SIZE))
    own = tensors_of(backbone.program)
    tensors = {name: (own[name].detach() * 1.01).contiguous() for name in weight_names(backbone.program)}
    safetensors.torch.save_file(tensors, tmp_path / "tuned.safetensors")
    place = ("--image-size", SIZE, "--bank", tmp_path / "bank")
    add = ("add", "--model", tmp_path / "tuned.safetensors", "--task-name", "press-1", "--labels", "ok, ng", *place)
    code, data, _ = run(*add)
    assert (code, data["kind"], data["new"]) == (0, "tuned", True)
    assert run(*add)[1]["new"] is False
    with Bank.open(tmp_path / "bank") as bank:
        bank.add(make_record("older", fingerprint="older weights", layout=backbone.layout.digest))
        bank.add(make_record("foreign", fingerprint="foreign", layout="foreign"))
    code, evidence, _ = run("similar", "--task", task_folder, "--per-class", 4, *place)
    assert (code, evidence["verdict"], evidence["other_backbones"]) == (0, "blend", 2)
    assert [task for _, task, _ in evidence["silent"]] == ["press-1"]
    code, data, _ = run("carry", *place)
    assert (code, len(data["new"]), data["learn_again"]) == (0, 1, ["foreign"])
    code, data, _ = run("carry", "--from", "foreign", *place)
    assert (code, "--task foreign" in data["error"]["next"]) == (ExitCode.INPUT, True)
    code, data, _ = run("add", "--model", tmp_path / "none", "--task-name", "x", *place)
    assert (code, "no file" in data["error"]["what"]) == (ExitCode.INPUT, True)
