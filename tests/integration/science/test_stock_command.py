"""``kiridashi stock`` on small task folders with the real backbone: make, go on, show, settle, what is refused."""

import json

import numpy as np
import pytest
from kiridashi import command
from kiridashi.errors import ExitCode
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli import stock as stock_commands
from kiridashi_server.settle import choice, playing
from kiridashi_server.settle.store import FILE, read_settled
from kiridashi_server.stock import run as stock_run
from kiridashi_server.stock.pieces import StockMaker
from kiridashi_server.stock.store import MANIFEST, load_stock
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import make_record, tiny_samples

SIZE = 32


@pytest.fixture(scope="module")
def lite0():
    return Backbone.load(image_size=SIZE)


@pytest.fixture
def run(capsys):
    """Run one stock command with ``--json``; gives the exit code, the data, and what was written to standard error."""

    def call(*arguments):
        code = command.main("kiridashi", "", stock_commands.COMMANDS, ["stock", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return call


@pytest.fixture
def place(tmp_path, lite0):
    """A bank with one record of made-up scores."""
    rng = np.random.default_rng(0)
    scores = {name: rng.random(size).astype(np.float32) + 0.1 for name, size in lite0.layout.sizes.items()}
    with Bank.open(tmp_path / "bank") as bank:
        bank.add(make_record("past", scores=scores, fingerprint=lite0.fingerprint, layout=lite0.layout.digest))
    return ("--bank", tmp_path / "bank", "--image-size", SIZE)


@pytest.fixture
def tasks(tmp_path):
    """Two task folders, one without a split ``val``."""
    for name, splits in (("hues", ("train", "val")), ("tints", ("train",))):
        samples = {split: tiny_samples(4, seed) for seed, split in enumerate(splits)}
        save_task_folder(Task(name, ("red", "green", "blue"), samples), tmp_path / name)
    return ("--task", tmp_path / "hues", "--task", tmp_path / "tints")


def test_a_stopped_making_goes_on_with_the_next_piece(run, place, tasks, tmp_path, lite0, monkeypatch):
    made = []
    piece = StockMaker.piece

    def counted(self, before, progress):
        if len(made) == 1 and "stopped" not in made:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(len(before))
        return piece(self, before, progress)

    monkeypatch.setattr(StockMaker, "piece", counted)
    make = ("make", *tasks, *place, "--shares", "1,0.4", "--iterations", 1)
    folder = tmp_path / "bank" / "stock" / f"efficientnet-lite0-{SIZE}"
    assert run(*make)[0] == ExitCode.INTERRUPTED
    assert not (folder / MANIFEST).exists()
    code, data, _ = run(*make)
    assert (code, data["stock"]) == (0, str(folder))
    assert made == [0, "stopped", 1]
    assert set(data["making"]["tasks"]) == {"hues", "tints"}
    assert data["making"]["settings"]["shares"] == [1.0, 0.4]
    whole, small = data["pieces"]
    assert whole["parameters"] == lite0.costs.parameters({}) > 2 * small["parameters"]
    assert run("show", *place)[1] == data
    assert len(load_stock(folder, lite0).pieces) == 2
    assert run(*make)[1]["pieces"] == data["pieces"]
    assert made == [0, "stopped", 1]


def test_a_finished_piece_that_was_changed_is_not_used(run, place, tasks, tmp_path):
    make = ("make", *tasks, *place, "--shares", "1", "--iterations", 1)
    assert run(*make)[0] == 0
    file = next((tmp_path / "bank").rglob(stock_run._FILE))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, data, _ = run(*make)
    assert code == ExitCode.STATE
    assert "missing or changed" in data["error"]["what"]
    assert str(file.parent) in data["error"]["next"]


def test_what_cannot_be_made_is_refused_before_anything_is_written(run, place, tasks, tmp_path):
    once = ("--task", tmp_path / "hues")
    for arguments, words in (
        (("make", *once, *once, *place), "two tasks are called 'hues'"),
        (("make", *once, *place, "--shares", "0.5,1"), "out of order"),
        (("make", *once, *place, "--shares", "all"), "numbers with commas"),
        (("make", *once, *place, "--iterations", "0"), "out of range"),
        (("make", *once, *place[:2], "--image-size", 32, "--bank", tmp_path / "none"), "no bank"),
        (("show", *place), "there is no stock"),
    ):
        code, data, _ = run(*arguments)
        assert code != 0
        assert words in data["error"]["what"]
    assert not list(tmp_path.rglob(MANIFEST))


def test_a_bank_without_records_of_the_backbone_cannot_have_a_stock(run, tmp_path, tasks):
    with Bank.open(tmp_path / "bank") as bank:
        bank.add(make_record("foreign"))
    code, data, _ = run("make", *tasks, "--bank", tmp_path / "bank", "--image-size", SIZE)
    assert code != 0
    assert "no record of efficientnet-lite0" in data["error"]["what"]


def test_settling_lets_tasks_of_the_stock_play_new(run, tmp_path, lite0, monkeypatch, capsys):
    """Three options less, one size, one iteration, so that it takes seconds."""
    monkeypatch.setattr(playing, "SHARES", (0.5,))
    monkeypatch.setattr(choice, "_PAIRS", ((0, None), (1, 0.5)))
    monkeypatch.setattr(choice, "OPTIONS", {"iterations": choice._pairs})
    rng = np.random.default_rng(0)
    names = ("hues", "tints", "shades", "tones")
    with Bank.open(tmp_path / "bank") as bank:
        for seed, name in enumerate(names):
            splits = {"train": tiny_samples(3, seed), "val": tiny_samples(2, seed + 50)}
            save_task_folder(Task(name, ("red", "green", "blue"), splits), tmp_path / name)
            scores = {group: rng.random(size).astype(np.float32) for group, size in lite0.layout.sizes.items()}
            head = rng.normal(size=(3, 1280))
            layout = lite0.layout.digest
            bank.add(make_record(name, scores=scores, head=head, fingerprint=lite0.fingerprint, layout=layout))
    place = ("--bank", tmp_path / "bank", "--image-size", SIZE)
    given = [part for name in names for part in ("--task", tmp_path / name)]
    code, data, _ = run("settle", *given, *place)
    assert (code, data["error"]["what"][:16]) == (ExitCode.STATE, "there is no stoc")
    made = run("make", *given, *place, "--shares", "1,0.6", "--iterations", 1)[1]
    folder = tmp_path / "bank" / "stock" / f"efficientnet-lite0-{SIZE}"

    code, data, _ = run("settle", *given[:-2], *place)
    assert code != 0
    assert "'tones' is missing, new or changed" in data["error"]["what"]
    assert not (folder / FILE).exists()

    code, data, _ = run("settle", *given, *place)
    assert (code, data["file"]) == (0, str(folder / FILE))
    assert data["tasks"] == made["making"]["tasks"]
    assert set(data["played"]) < set(names)
    assert [len(data[kind]["steps"][0]["rows"]) for kind in ("with_stock", "without_stock")] == [2, 2]
    assert "on 2 tasks that played new" in data["with_stock"]["reason"]
    assert run("settle", *given, *place)[1] == data
    words = ["stock", "show", *map(str, place)]
    assert command.main("kiridashi", "", stock_commands.COMMANDS, words) == 0
    assert f"recovered: {data['with_stock']['reason']}" in capsys.readouterr().out
    kept = read_settled(folder)
    assert kept.with_stock.settings.iterations in (0, 1)
    assert load_stock(folder, lite0).digest
