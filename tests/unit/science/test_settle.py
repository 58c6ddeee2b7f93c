"""Settling: the rule of one standard error, who plays new, stages that are kept, and what the file holds for."""

from contextlib import contextmanager
from dataclasses import replace

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError
from kiridashi_server.recover.iterations import RecoverSettings
from kiridashi_server.settle import choice as choices
from kiridashi_server.settle import playing
from kiridashi_server.settle import run as runs
from kiridashi_server.settle.choice import PLAYED, described, settle, unsettled, within_one_error
from kiridashi_server.settle.playing import few_of, hold_back, play, without
from kiridashi_server.settle.run import CELL, run_settling
from kiridashi_server.settle.store import FILE, Settled, read_settled, recovery_for, save_settled
from kiridashi_server.stages import Workspace
from kiridashi_server.stock.pieces import StockSettings
from kiridashi_server.stock.store import Making, StockError
from kiridashi_server.tasks import Task
from tiny_science import make_record, tiny_samples, tiny_task

STOCK = StockSettings(shares=(1.0, 0.6), iterations=1, batch_size=12, repair_images=12)
DEFAULT = RecoverSettings()

ACCURACIES = st.tuples(st.integers(1, 6), st.integers(2, 9)).flatmap(
    lambda shape: arrays.arrays(np.float64, shape, elements=st.integers(0, 96).map(lambda right: right / 96))
)


@given(ACCURACIES)
def test_the_first_option_within_one_error_of_the_best_is_taken(accuracies):
    verdict = within_one_error(accuracies)
    means = accuracies.mean(axis=1)
    assert verdict.behind == pytest.approx(means.max() - means)
    assert verdict.behind[verdict.chosen] <= verdict.error[verdict.chosen] + 1e-8
    assert all(verdict.behind[n] > verdict.error[n] for n in range(verdict.chosen))
    assert verdict.chosen <= int(np.argmax(means))


@given(ACCURACIES, st.randoms(use_true_random=False))
def test_the_order_of_the_tasks_and_how_hard_each_is_change_nothing(accuracies, random):
    order = list(range(accuracies.shape[1]))
    random.shuffle(order)
    hardness = np.arange(accuracies.shape[1]) / 8
    assert within_one_error(accuracies[:, order] + hardness).chosen == within_one_error(accuracies).chosen


def test_the_error_is_that_of_differences_to_the_best():
    hardness = np.array([0.1, 0.3, 0.5, 0.9])
    steady, shaky = np.full(4, 0.02), np.array([-0.05, 0.09, 0.09, -0.05])
    best = hardness
    assert within_one_error(np.stack([best - steady, best])).chosen == 1
    verdict = within_one_error(np.stack([best - shaky, best]))
    assert verdict.chosen == 0
    assert verdict.error[0] == pytest.approx(shaky.std(ddof=1) / 2)


def test_all_equal_takes_the_cheapest():
    assert within_one_error(np.full((4, 3), 0.5)).chosen == 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 1), (2, 0), (4,)])
def test_one_task_or_no_option_decides_nothing(shape):
    with pytest.raises(InputError, match="two or more tasks"):
        within_one_error(np.zeros(shape))


def _world(gains, strength=None, ridge=None):
    """Plays options: accuracy 0.5 and what (iterations, way) gains, less for wrong strengths; eight tasks, no noise."""
    asked = []

    def accuracies(settings):
        asked.append(settings)
        lost = 0.05 * (strength is not None and settings.repair_strength != pytest.approx(strength))
        lost += 0.03 * (ridge is not None and settings.ridge != pytest.approx(ridge))
        gained = gains.get((settings.iterations, settings.way), gains.get(settings.iterations, 0.0))
        return 0.5 + gained - lost + np.linspace(0, 0.3, 8)

    return accuracies, asked


def test_options_are_tried_one_setting_after_the_other_and_once_each():
    accuracies, asked = _world({(20, 1.0): 0.1}, strength=4 * DEFAULT.repair_strength, ridge=DEFAULT.ridge / 4)
    found = settle(accuracies)
    expected = replace(DEFAULT, way=1.0, ridge=DEFAULT.ridge / 4, repair_strength=4 * DEFAULT.repair_strength)
    assert found.settings == expected
    assert len(asked) == len(set(asked)) == PLAYED == 8
    assert [step.setting for step in found.steps] == ["iterations", "ridge", "repair strength"]
    assert found.reason == (
        "20 iterations, all of their way: the best on 8 tasks that played new, ridge 0.25, repair strength 2.8"
    )


def test_what_does_not_matter_stays_at_its_default_without_iterations():
    accuracies, _ = _world({})
    found = settle(accuracies)
    assert found.settings == replace(DEFAULT, iterations=0)
    assert found.reason == "0 iterations: the best on 8 tasks that played new"


def test_a_lead_within_the_error_is_told_and_not_followed():
    shaky = np.array([0.3, -0.2, 0.3, -0.2, 0.3, -0.2, 0.3, -0.2])

    def accuracies(settings):
        return 0.5 + shaky * (settings.iterations == 50)

    found = settle(accuracies)
    assert found.settings.iterations == 0
    assert found.reason == (
        "0 iterations: within one standard error of the best on 8 tasks that played new "
        "(50 iterations, 50% of their way, 5.0 points more)"
    )


def test_a_quarter_is_held_back_by_digest_and_only_what_can_be_judged():
    tasks = [tiny_task(f"task {number}", seed=3 * number) for number in range(12)]
    blind = Task("blind", ("red", "green", "blue"), {"train": tiny_samples(4, 99)})
    new, others = hold_back([*tasks, blind])
    assert [task.digest for task in new] == sorted(task.digest for task in tasks)[:4]
    assert hold_back([blind, *reversed(tasks)]) == (new, others)
    assert {task.name for task in [*new, *others]} == {task.name for task in [*tasks, blind]}
    twenty = [tiny_task(f"task {number}", seed=3 * number) for number in range(20)]
    assert [len(hold_back(twenty[:count])[0]) for count in (4, 5, 7, 8, 16, 20)] == [2, 2, 3, 4, 4, 5]
    assert hold_back([blind]) == ([], [blind])


def test_a_task_that_plays_new_is_unknown_to_the_bank_by_name_and_by_samples():
    task = tiny_task("hues")
    renamed = make_record("hues in may")
    renamed = replace(renamed, provenance=replace(renamed.provenance, task_digest=task.digest))
    other = make_record("tints")
    assert without([make_record("hues"), renamed, other], [task]) == [other]


def test_a_small_class_gives_all_it_has():
    assert len(few_of(tiny_task(), 0)) == 3 * 6
    small = Task("small", ("red", "green", "blue"), {"train": tiny_samples(4, 0)})
    assert len(few_of(small, 0)) == 3 * 4


@contextmanager
def _quiet(label):
    yield lambda done, total: None


@pytest.fixture
def tasks():
    return [tiny_task(f"task {number}", seed=3 * number) for number in range(4)]


@pytest.fixture
def records(backbone, tasks):
    rng = np.random.default_rng(0)
    return [
        make_record(
            task.name,
            scores={name: rng.random(size).astype(np.float32) + 0.1 for name, size in backbone.layout.sizes.items()},
            head=rng.normal(size=(3, 32)),
            fingerprint=backbone.fingerprint,
            layout=backbone.layout.digest,
        )
        for task in tasks
    ]


@pytest.fixture
def small(monkeypatch):
    """Sizes that the tiny backbone can be cut to, and few iterations."""
    monkeypatch.setattr(playing, "SHARES", (0.6, 0.4))
    monkeypatch.setattr(choices, "_PAIRS", ((0, None), (1, 0.5)))


def test_settling_goes_on_with_the_next_cell(backbone, tasks, records, small, tmp_path, monkeypatch):
    made, stopped = [], []

    def counted(backbone, task, settings, stock, seed):
        if len(made) == 5 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        made.append((settings, stock is not None))
        return play(backbone, task, settings, stock, seed)

    monkeypatch.setattr(runs, "play", counted)

    def settled():
        workspace = Workspace(tmp_path)
        return run_settling(workspace, backbone, tasks, records, STOCK, 0, _quiet), workspace

    with pytest.raises(KeyboardInterrupt):
        settled()
    found, workspace = settled()
    # two tasks, six options, with a stock and without: no cell twice
    assert len(made) == 2 * 6 * 2
    assert [stage.reused for stage in workspace.times if stage.name.startswith(CELL)].count(True) == 5
    again, workspace = settled()
    assert again.with_stock == found.with_stock
    assert all(stage.reused for stage in workspace.times)
    assert len(made) == 2 * 6 * 2
    assert found.played == tuple(
        sorted((t.name for t in tasks), key=lambda n: {t.name: t.digest for t in tasks}[n])[:2]
    )
    for choice in (found.with_stock, found.without_stock):
        assert "2 tasks that played new" in choice.reason
        assert len(choice.steps) == 3
        assert all(0 <= row.accuracy <= 1 for step in choice.steps for row in step.rows)
    assert [out_of_stock for _, out_of_stock in made].count(True) == 2 * 6


def test_who_plays_new_is_in_no_stock_and_no_composition(backbone, tasks, records, small, tmp_path, monkeypatch):
    seen = {}
    make, compose = runs.run_stock, playing.compose_scores

    def stock(workspace, backbone, past, known, *rest):
        seen["stock"] = ({task.name for task in past}, {record.task for record in known})
        return make(workspace, backbone, past, known, *rest)

    def composed(backbone, known, *rest):
        seen["composed"] = {record.task for record in known}
        return compose(backbone, known, *rest)

    monkeypatch.setattr(runs, "run_stock", stock)
    monkeypatch.setattr(playing, "compose_scores", composed)
    found = run_settling(Workspace(tmp_path), backbone, tasks, records, STOCK, 0, _quiet)
    others = {task.name for task in tasks} - set(found.played)
    assert seen == {"stock": (others, others), "composed": others}


def test_too_few_tasks_leave_the_defaults_and_measure_nothing(backbone, tasks, records, tmp_path):
    blind = [Task(task.name, task.labels, {"train": task.split("train")}) for task in tasks]
    for given_tasks, count in ((tasks[:3], 1), (blind, 0)):
        found = run_settling(Workspace(tmp_path), backbone, given_tasks, records, STOCK, 0, _quiet)
        assert found.with_stock == found.without_stock
        assert found.with_stock.settings == DEFAULT
        assert f"{count} of {len(given_tasks)} tasks could play new" in found.with_stock.reason
        assert found.played == ()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def settled(backbone):
    return Settled(
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        input_size=backbone.input_size,
        tasks={"hues": "sha256:1"},
        stock=STOCK,
        seed=0,
        played=("hues",),
        with_stock=unsettled("of a test", replace(DEFAULT, iterations=0)),
        without_stock=settle(_world({50: 0.1})[0]),
        seconds=1.0,
    )


MAKING = Making(tasks={"hues": "sha256:1"}, records=("a",), settings=STOCK, seed=3, seconds=2.0)


def test_what_was_settled_survives_its_file(settled, tmp_path):
    assert read_settled(tmp_path) is None
    for folder in (tmp_path, tmp_path / "a" / "new"):
        save_settled(folder, settled)
        assert read_settled(folder) == settled


def test_a_file_that_is_none_is_refused(settled, tmp_path):
    path = save_settled(tmp_path, settled)
    text = path.read_text()
    for wrong in (text[: len(text) // 2], text.replace("kiridashi-recovery-1", "kiridashi-recovery-0")):
        path.write_text(wrong)
        with pytest.raises(StockError, match=FILE):
            read_settled(tmp_path)
    path.write_text(text.replace('"iterations": 50', '"iterations": -50'))
    with pytest.raises(StockError, match="cannot be read"):
        read_settled(tmp_path)


def test_it_holds_for_this_backbone_and_this_stock_only(backbone, settled):
    assert recovery_for(settled, backbone, MAKING).settings.iterations == 0
    plain = recovery_for(settled, backbone, None)
    assert (plain.settings.iterations, plain.reason) == (50, settled.without_stock.reason)

    quick = RecoverSettings(iterations=3)
    other = replace(backbone, name="other", input_size=(3, 8, 8))
    changed = Making({"hues": "sha256:2"}, ("a",), STOCK, 3, 2.0)
    longer = Making(MAKING.tasks, ("a",), replace(STOCK, iterations=2), 3, 2.0)
    for found, words in (
        (recovery_for(None, backbone, MAKING, quick), "nothing was settled"),
        (recovery_for(settled, other, None, quick), "another backbone"),
        (recovery_for(settled, backbone, changed, quick), "another stock"),
        (recovery_for(settled, backbone, longer, quick), "another stock"),
    ):
        assert found.settings == quick
        assert found.reason.startswith("3 iterations, 50% of their way: the default, because")
        assert words in found.reason


def test_who_asks_for_iterations_gets_them(backbone, settled):
    found = recovery_for(settled, backbone, MAKING).but(7)
    assert found.settings == replace(DEFAULT, iterations=7)
    assert found.reason == f"{described(found.settings)}: as asked for"
