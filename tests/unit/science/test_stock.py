"""The stock: pieces that lie inside each other, joint training, blanks for new lines, and the folder it is kept in."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi_server.budget.solver import plan_size
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.program import tensor_names, tensor_of
from kiridashi_server.recover.descent import Schedule
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import RecoverSettings, recover_cut
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.stock.joint import JointTasks, _heads, _loss, train_jointly
from kiridashi_server.stock.pieces import Piece, Stock, StockMaker, StockSettings, make_stock, piece_plans
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
    return make_stock(backbone, TASKS, scores, SETTINGS, seed=0)


def _tensors(program):
    return {name: tensor_of(program, name).detach() for name in tensor_names(program)}


def test_pieces_lie_inside_each_other_and_keep_about_their_share(backbone, stock):
    dense = backbone.costs.parameters({})
    assert stock.pieces[0].plan.counts == dict(backbone.layout.sizes)
    for outer, inner in pairwise(stock.pieces):
        assert all(set(units) <= set(outer.plan.kept[name]) for name, units in inner.plan.kept.items())
    assert backbone.costs.parameters(stock.pieces[-1].plan.counts) <= 0.4 * dense
    found = [sum(p.numel() for p in piece.program.parameters()) for piece in stock.pieces]
    assert found == [backbone.costs.parameters(piece.plan.counts) for piece in stock.pieces]


def test_plans_lie_inside_each_other_at_any_shares(backbone, scores):
    plans = piece_plans(backbone, scores, (1.0, 0.7, 0.5, 0.45, 0.4))
    for outer, inner in pairwise(plans):
        assert all(set(units) <= set(outer.kept[name]) for name, units in inner.kept.items())


def test_a_blank_is_the_smallest_piece_with_all_units(backbone, scores, stock):
    small = plan_size(backbone.layout, backbone.costs, scores, int(0.38 * backbone.costs.parameters({})))
    fits = [piece for piece in stock.pieces if all(set(u) <= set(piece.plan.kept[n]) for n, u in small.kept.items())]
    assert stock.blank(small).program is fits[-1].program
    assert stock.blank(stock.pieces[0].plan).program is stock.pieces[0].program
    assert stock.blank(stock.pieces[1].plan).program is stock.pieces[1].program


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


def test_progress_runs_over_all_pieces(backbone, scores):
    seen = []
    make_stock(backbone, TASKS, scores, SETTINGS, seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]


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
        make_stock(backbone, [], scores, SETTINGS, seed=0)


MAKING = Making(tasks={"hues": "sha256:1"}, records=("a",), settings=SETTINGS, seed=0, seconds=1.0)


def test_a_stock_survives_its_folder(backbone, stock, tmp_path):
    manifest = save_stock(tmp_path, stock, backbone, MAKING)
    assert read_manifest(tmp_path) == manifest
    again = load_stock(tmp_path, backbone)
    assert again.digest == stock.digest
    assert [piece.plan for piece in again.pieces] == [piece.plan for piece in stock.pieces]


def test_a_changed_or_foreign_stock_is_refused(backbone, stock, tmp_path):
    save_stock(tmp_path, stock, backbone, MAKING)
    file = tmp_path / "piece-1.safetensors"
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
    records = [make_record("a"), make_record("b", scores=own, layout=backbone.layout.digest)]
    found = stock_scores(backbone, records)
    assert all(np.allclose(found[name], own[name]) for name in own)
    with pytest.raises(InputError, match="no record of tiny"):
        stock_scores(backbone, records[:1])


def test_the_devices_splits_are_left_alone():
    task = tiny_task()
    samples = server_samples(task)
    assert len(samples) == len(task.split("train")) + len(task.split("val"))
    assert not set(samples.sources) & set(task.split("test").sources)
