"""The stock: pieces that lie inside each other, joint training, blanks for new lines, and the folder it is kept in."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi_server.budget.solver import plan_size
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import tensor_names, tensor_of
from kiridashi_server.recover.descent import Schedule
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import RecoverSettings, recover_cut
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.stock.joint import JointTasks, _heads, _loss, train_jointly
from kiridashi_server.stock.pieces import Piece, Stock, StockMaker, StockSettings, piece_plans
from kiridashi_server.stock.run import server_samples, stock_scores
from kiridashi_server.stock.store import Making, StockError, load_stock, read_manifest, save_stock
from tiny_science import CLASSES, make_record, tiny_samples, tiny_task

TASKS = [tiny_samples(6, 0), tiny_samples(8, 1)]
SETTINGS = StockSettings(shares=(1.0, 0.6, 0.4), iterations=4, batch_size=12, repair_images=24)


@pytest.fixture(scope="module")
def scores(backbone):
    rng = np.random.default_rng(0)
    return {name: rng.random(size).astype(np.float32) + 0.1 for name, size in backbone.layout.sizes.items()}


@pytest.fixture(scope="module")
def stock(backbone, scores):
    maker = StockMaker(backbone, TASKS, piece_plans(backbone, scores, SETTINGS.shares), SETTINGS, seed=0)
    pieces = []
    for _ in range(len(maker)):
        pieces.append(maker.piece(pieces))
    return maker.stock(pieces)


def _tensors(program):
    return {name: tensor_of(program, name).detach() for name in tensor_names(program)}


def test_pieces_lie_inside_each_other_and_keep_about_their_share(backbone, stock):
    dense = backbone.costs.parameters({})
    assert stock.pieces[0].plan.counts == dict(backbone.layout.sizes)
    for outer, inner in pairwise(stock.pieces):
        assert all(set(units) <= set(outer.plan.kept[name]) for name, units in inner.plan.kept.items())
    assert backbone.costs.parameters(stock.pieces[-1].plan.counts) <= 0.45 * dense
    found = [sum(p.numel() for p in piece.program.parameters()) for piece in stock.pieces]
    assert found == [backbone.costs.parameters(piece.plan.counts) for piece in stock.pieces]


def test_plans_lie_inside_each_other_at_any_shares(backbone, scores):
    plans = piece_plans(backbone, scores, (1.0, 0.7, 0.5, 0.45, 0.4))
    for outer, inner in pairwise(plans):
        assert all(set(units) <= set(outer.kept[name]) for name, units in inner.kept.items())


@pytest.mark.parametrize(("share", "number"), [(1.0, 0), (0.8, 0), (0.55, 1), (0.45, 1), (0.35, 2), (0.3, 2)])
def test_a_plan_of_the_same_scores_is_cut_out_of_the_next_larger_piece(backbone, scores, stock, share, number):
    plan = plan_size(backbone.layout, backbone.costs, scores, int(share * backbone.costs.parameters({})))
    assert stock.number_for(plan) == number
    assert stock.blank(plan).program is stock.pieces[number].program


def test_a_plan_with_a_unit_that_a_piece_lacks_is_cut_out_of_a_larger_one(backbone, stock):
    kept = dict(stock.pieces[2].plan.kept)
    name = next(name for name, units in kept.items() if len(units) < backbone.layout.sizes[name])
    lacking = next(unit for unit in range(backbone.layout.sizes[name]) if unit not in stock.pieces[1].plan.kept[name])
    plan = Plan.of(backbone.layout, {**kept, name: {*kept[name], lacking}})
    assert stock.number_for(plan) == 0


def test_cutting_out_of_a_piece_is_cutting_out_of_the_backbone_where_nothing_was_tuned(backbone, scores):
    dense = backbone.costs.parameters({})
    plans = [plan_size(backbone.layout, backbone.costs, scores, int(share * dense)) for share in (1.0, 0.6)]
    pieces = tuple(Piece(plan, cut(backbone.program, backbone.tracking, plan)) for plan in plans)
    stock = Stock(backbone.fingerprint, backbone.layout.digest, pieces)
    kept = {name: units[::2] if len(units) > 16 else units for name, units in plans[1].kept.items()}
    plan = type(plans[1]).of(backbone.layout, kept)
    blank = stock.blank(plan)
    assert blank.program is pieces[1].program
    direct, through = (
        _tensors(cut(program, tracking, inner))
        for program, tracking, inner in (
            (backbone.program, backbone.tracking, plan),
            (blank.program, blank.tracking, blank.plan),
        )
    )
    assert direct.keys() == through.keys()
    assert all(torch.equal(direct[name], through[name]) for name in direct)


def test_recovery_starts_from_the_piece(backbone, scores, stock):
    plan = plan_size(backbone.layout, backbone.costs, scores, int(0.38 * backbone.costs.parameters({})))
    arguments = {"classes": CLASSES, "settings": RecoverSettings(iterations=0, repair=False), "seed": 0}
    with_stock = recover_cut(backbone, plan, TASKS[0], **arguments, blank=stock.blank(plan))
    without = recover_cut(backbone, plan, TASKS[0], **arguments)
    blank = stock.blank(plan)
    expected = dict(cut(blank.program, blank.tracking, blank.plan).named_parameters())
    found = dict(with_stock.model.features.named_parameters())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], value) for name, value in without.model.features.named_parameters())
    assert with_stock.plan == plan


def test_joint_training_judges_each_sample_among_its_own_tasks_classes(backbone):
    joint = JointTasks.of(backbone, TASKS)
    expected = []
    for samples in TASKS:
        features = run_batched(backbone.program, to_input(backbone, samples.images)).numpy()
        head = fit_ridge_head(features, samples.labels, CLASSES)
        logits = torch.from_numpy(features @ head.weight.T + head.bias)
        expected.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(samples.labels), reduction="sum"))
    with torch.no_grad():
        features = backbone.program(joint.inputs)
        rows = torch.arange(len(joint.inputs))
        found = _loss(_heads(backbone.program, joint)(features), joint, rows)
    assert float(found) == pytest.approx(float(sum(expected)) / len(joint.inputs), rel=1e-4)


def test_every_task_is_drawn_as_often_as_any_other_and_all_of_its_samples(backbone):
    joint = JointTasks.of(backbone, [tiny_samples(20, 0), tiny_samples(2, 1)])
    rows = joint.draw(100, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows, minlength=66)
    assert (int(counts[:60].sum()), int(counts[60:].sum())) == (50, 50)
    assert int(counts[:60].max()) == 1
    assert {int(count) for count in counts[60:]} == {8, 9}
    assert len(joint.draw(1, torch.Generator().manual_seed(0))) == 1


def test_joint_training_fits_the_tasks_and_leaves_the_program_alone(backbone):
    joint = JointTasks.of(backbone, TASKS)
    before = {name: tensor.clone() for name, tensor in _tensors(backbone.program).items()}

    def trained(seed):
        generator = torch.Generator().manual_seed(seed)
        schedule = Schedule(iterations=6, learning_rate=5e-3, warm_up=0.5)
        return _tensors(train_jointly(backbone.program, joint, schedule, batch_size=12, generator=generator))

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(before[name], tensor) for name, tensor in _tensors(backbone.program).items())
    changed = {name for name in first if not torch.equal(first[name], before[name])}
    assert "project.weight" in changed
    assert not any("running" in name for name in changed)


def test_the_rate_rises_then_falls_to_zero():
    schedule = Schedule(iterations=10, learning_rate=1.0, warm_up=0.2)
    rates = [schedule.rate(done) for done in range(11)]
    assert rates[0] == pytest.approx(1 / 3)
    assert max(rates) == rates[2]
    assert rates[10] == pytest.approx(0)
    assert Schedule(iterations=10, learning_rate=1.0).rate(0) == 1


def test_pieces_made_one_by_one_are_those_made_at_once(backbone, scores, stock):
    plans = piece_plans(backbone, scores, SETTINGS.shares)
    maker = StockMaker(backbone, TASKS, plans, SETTINGS, seed=0)
    alone = maker.piece(stock.pieces[:2])
    assert alone.plan == stock.pieces[2].plan
    kept, found = _tensors(stock.pieces[2].program), _tensors(alone.program)
    assert all(torch.equal(kept[name], found[name]) for name in kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shares": (0.9, 0.5)},
        {"shares": (1.0, 0.5, 0.5)},
        {"shares": ()},
        {"shares": (1.0, 0.0)},
        {"iterations": 0},
        {"learning_rate": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        StockSettings(**wrong)


def test_no_task_is_refused(backbone, scores):
    with pytest.raises(InputError, match="at least one task"):
        StockMaker(backbone, [], piece_plans(backbone, scores, SETTINGS.shares), SETTINGS, seed=0)


MAKING = Making(tasks={"hues": "sha256:1"}, records=("a",), settings=SETTINGS, seed=0, seconds=1.0)


def test_a_stock_survives_its_folder(backbone, stock, tmp_path):
    manifest = save_stock(tmp_path, stock, backbone, MAKING)
    assert read_manifest(tmp_path) == manifest
    again = load_stock(tmp_path, backbone)
    assert again.digest == stock.digest
    assert [piece.plan for piece in again.pieces] == [piece.plan for piece in stock.pieces]


def test_a_stock_replaces_an_earlier_one_whole_or_not_at_all(backbone, stock, tmp_path, monkeypatch):
    save_stock(tmp_path, stock, backbone, MAKING)
    smaller = Stock(stock.backbone_fingerprint, stock.layout_digest, stock.pieces[:1])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kiridashi_server.stock.store.save_cut", full)
        with pytest.raises(StockError, match="cannot be written"):
            save_stock(tmp_path, smaller, backbone, MAKING)
    assert load_stock(tmp_path, backbone).digest == stock.digest
    save_stock(tmp_path, smaller, backbone, MAKING)
    assert load_stock(tmp_path, backbone).digest == smaller.digest
    assert len(list(tmp_path.glob("piece-*"))) == 1


def test_a_changed_or_foreign_stock_is_refused(backbone, stock, tmp_path):
    save_stock(tmp_path, stock, backbone, MAKING)
    file = next(tmp_path.glob("piece-1-*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StockError, match="missing or changed"):
        load_stock(tmp_path, backbone)
    file.unlink()
    with pytest.raises(StockError, match="missing or changed"):
        load_stock(tmp_path, backbone)
    text = (tmp_path / "stock.json").read_text()
    (tmp_path / "stock.json").write_text(text.replace(backbone.fingerprint, "0" * 64))
    with pytest.raises(StockError, match="another backbone"):
        load_stock(tmp_path, backbone)
    (tmp_path / "stock.json").write_text(text.replace("16,", "32,"))
    with pytest.raises(StockError, match="images of 32 pixels"):
        load_stock(tmp_path, backbone)
    (tmp_path / "stock.json").write_text(text.replace("piece-1", "../piece-1"))
    with pytest.raises(StockError, match="no stock that this version reads"):
        load_stock(tmp_path, backbone)
    (tmp_path / "stock.json").write_text(text[: len(text) // 2])
    with pytest.raises(StockError, match="cannot be read"):
        load_stock(tmp_path, backbone)
    (tmp_path / "stock.json").unlink()
    with pytest.raises(StockError, match="there is no stock"):
        load_stock(tmp_path, backbone)


def test_scores_of_other_backbones_do_not_count(backbone):
    own = {name: np.full(size, 2.0, dtype=np.float32) for name, size in backbone.layout.sizes.items()}
    other = {name: values + 1 for name, values in own.items()}
    digest = backbone.layout.digest
    records = [
        make_record("a", scores=other, layout=digest),
        make_record("b", scores=own, layout=digest, fingerprint=backbone.fingerprint),
    ]
    found = stock_scores(backbone, records)
    assert all(np.allclose(found[name], own[name]) for name in own)
    with pytest.raises(InputError, match="no record of tiny"):
        stock_scores(backbone, records[:1])


def test_the_devices_splits_are_left_alone():
    task = tiny_task()
    samples = server_samples(task)
    assert len(samples) == len(task.split("train")) + len(task.split("val"))
    assert not set(samples.sources) & set(task.split("test").sources)
