"""``kiridashi cut`` down to the cut itself: what it is made of, how it is recovered and why, down to no past at all.

The device is a made-up profile, and nothing is exported.
"""

import json
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import pytest
from kiridashi import command
from kiridashi.artifacts import write_atomic
from kiridashi_server import pipeline
from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli import cut as cut_commands
from kiridashi_server.cut_run import CutRun, Exported
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.iterations import RecoverSettings
from kiridashi_server.settle.choice import Choice
from kiridashi_server.settle.store import Settled, save_settled
from kiridashi_server.stock.pieces import Piece, Stock, StockSettings
from kiridashi_server.stock.store import Making, save_stock
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import made_up_profile, make_record, tiny_samples

SIZE = 32
MAKING = Making({"hues": "sha256:1"}, ("a",), StockSettings(shares=(1.0,)), 0, 1.0)


@pytest.fixture(scope="module")
def lite0():
    return Backbone.load(image_size=SIZE)


@pytest.fixture
def run(tmp_path, lite0, capsys, monkeypatch):
    """Run ``kiridashi cut --json`` for a new task under a budget of half the file; gives the exit code and the data."""
    monkeypatch.setattr(CutRun, "exported", property(lambda run: run.cut and Exported((), (), 0.0, 0.0)))
    monkeypatch.setattr(pipeline, "learn_scores", partial(learn_scores, settings=ScoreSettings(iterations=1)))
    splits = {"train": tiny_samples(3, 7), "val": tiny_samples(2, 8)}
    save_task_folder(Task("new", ("red", "green", "blue"), splits), tmp_path / "new")
    profile = made_up_profile(lite0)
    write_atomic(tmp_path / "profile.json", msgspec.json.encode(profile))

    def call(*arguments, as_json=True):
        given = ["--task", tmp_path / "new", "--line", "line", "-o", tmp_path / "work", "--image-size", SIZE]
        given += ["--profile", tmp_path / "profile.json", "--budget", "file=6MiB", *arguments]
        words = ["cut", *map(str, given), *(["--json"] if as_json else [])]
        code = command.main("kiridashi", "", cut_commands.COMMANDS, words)
        out, err = capsys.readouterr()
        return code, json.loads(out) if as_json else out, err

    return call


@pytest.fixture
def bank(tmp_path, lite0):
    """A bank with four records of made-up scores."""
    rng = np.random.default_rng(0)
    with Bank.open(tmp_path / "bank") as made:
        for number in range(4):
            scores = {group: rng.random(size).astype(np.float32) for group, size in lite0.layout.sizes.items()}
            head, layout = rng.normal(size=(3, 1280)), lite0.layout.digest
            name = f"past {number}"
            made.add(make_record(name, scores=scores, head=head, fingerprint=lite0.fingerprint, layout=layout))
    return tmp_path / "bank"


@pytest.fixture
def stock(bank, lite0):
    """A stock of the whole backbone, and what was settled for it."""
    folder = bank / "stock" / f"efficientnet-lite0-{SIZE}"
    whole = Piece(Plan.full(lite0.layout), lite0.program)
    save_stock(folder, Stock(lite0.fingerprint, lite0.layout.digest, (whole,)), lite0, MAKING)
    settled = Settled(
        backbone_fingerprint=lite0.fingerprint,
        layout_digest=lite0.layout.digest,
        input_size=lite0.input_size,
        tasks=MAKING.tasks,
        stock=MAKING.settings,
        seed=0,
        played=("hues",),
        with_stock=Choice(RecoverSettings(iterations=0, ridge=4.0), "0 iterations: the best of a test"),
        without_stock=Choice(RecoverSettings(iterations=2), "2 iterations: the best of another"),
        seconds=1.0,
    )
    save_settled(folder, settled)
    return folder, settled


def _recovery(data):
    settings = data["recovery"]["settings"]
    return settings["iterations"], settings["ridge"], data["recovery"]["reason"]


def test_what_was_settled_is_used_and_told_and_a_flag_wins(run, bank, stock):
    code, data, err = run("--bank", bank)
    assert (code, data["stock_piece"]) == (0, 0)
    assert _recovery(data) == (0, 4.0, "0 iterations: the best of a test")
    assert "0 iterations: the best of a test" in err
    code, text, _ = run("--bank", bank, as_json=False)
    assert "cut out of piece 1 of the stock" in text
    assert "0 iterations: the best of a test" in text

    code, data, _ = run("--bank", bank, "--no-stock")
    assert (code, data["stock_piece"]) == (0, None)
    assert _recovery(data) == (2, 1.0, "2 iterations: the best of another")

    code, data, _ = run("--bank", bank, "--iterations", 1)
    assert (code, data["stock_piece"]) == (0, 0)
    assert _recovery(data) == (1, 4.0, "1 iterations, 50% of their way: as asked for")


def test_what_was_settled_for_another_stock_is_not_used_and_that_is_told(run, bank, stock):
    folder, settled = stock
    save_settled(folder, msgspec.structs.replace(settled, stock=replace(MAKING.settings, iterations=7)))
    code, data, _ = run("--bank", bank)
    assert (code, data["stock_piece"]) == (0, 0)
    iterations, _, reason = _recovery(data)
    assert iterations == 20
    assert "the default, because recovery.json is of another stock" in reason


def test_an_empty_bank_and_no_bank_cut_by_the_tasks_own_scores(run, tmp_path):
    assert run("--bank", tmp_path / "none")[0] != 0
    with Bank.open(tmp_path / "empty"):
        pass
    for place in (("--bank", tmp_path / "empty"), ("--no-bank",)):
        code, data, _ = run(*place, "--iterations", 1)
        assert (code, data["stock_piece"]) == (0, None)
        assert data["explanation"].startswith("few-shot scores alone, because the bank cannot help")
        assert data["parameters"] < 0.5 * data["parameters_dense"]
    text = run("--no-bank", as_json=False)[1]
    assert "few-shot scores alone" in text
    assert "cut out of the backbone as it is" in text
    assert "20 iterations, 50% of their way: the default, because nothing was settled" in text
