"""Scores, cut, repair and recovery of a vision transformer: heads, channels of heads, MLP nodes, LayerScale."""

import pytest
import torch
from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.cut import cut, masked
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import capture
from kiridashi_server.graph.tracker import track
from kiridashi_server.recover.iterations import RecoverSettings, recover_cut
from kiridashi_server.recover.repair import repair
from kiridashi_server.stock.pieces import Piece, Stock
from tiny_science import CLASSES, SIDE, tiny_samples, tiny_vit, tiny_vit_backbone

HEADS, CHANNELS, NODES = "blocks.{}.attention.query:head", "blocks.{}.attention.value", "blocks.{}.fc1"


@pytest.fixture(scope="module")
def vit():
    return tiny_vit_backbone()


@pytest.fixture(scope="module")
def samples():
    return tiny_samples(8, 0)


def _images(seed, dtype=torch.float32):
    return torch.randn(60, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _plan(backbone, *kinds, blocks=(0, 1)):
    """Every other unit of these groups stays."""
    names = [kind.format(block) for kind in kinds for block in blocks]
    return Plan.of(backbone.layout, {name: range(0, backbone.layout.sizes[name], 2) for name in names})


def _error(backbone, program, images):
    with torch.no_grad():
        dense = backbone.program(images)
        return float((dense - program(images)).square().mean() / dense.var(dim=0).mean())


def test_heads_their_channels_and_nodes_can_be_cut_and_the_stream_cannot(vit):
    expected = {kind.format(block): size for kind, size in ((HEADS, 3), (CHANNELS, 8), (NODES, 96)) for block in (0, 1)}
    assert vit.layout.sizes == expected
    assert {group.kind for group in vit.layout.groups if group.size == 3} == {"head"}
    reasons = {axis.reason for axis in vit.layout.frozen if axis.size == 24}
    assert reasons == {"layer normalisation"}


def test_the_cut_is_exact(vit):
    program = capture(tiny_vit().double(), torch.zeros(2, 3, SIDE, SIDE, dtype=torch.float64))
    tracking = track(program, cuttable_output=True)
    images = _images(1, torch.float64)
    for kinds in ((HEADS,), (CHANNELS,), (NODES,), (HEADS, CHANNELS, NODES)):
        plan = _plan(vit, *kinds)
        with torch.no_grad():
            want, got = masked(program, tracking, plan)(images), cut(program, tracking, plan)(images)
            assert (want - program(images)).abs().max() > 1e-2
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        ((HEADS,), ["attention.output"]),
        ((CHANNELS,), ["attention.output"]),
        ((NODES,), ["fc2"]),
        ((HEADS, CHANNELS, NODES), ["attention.output", "fc2"]),
    ],
)
def test_repair_refits_the_layers_that_read_heads_and_nodes(vit, kinds, layers):
    plan = _plan(vit, *kinds)
    small = cut(vit.program, vit.tracking, plan)
    repaired = repair(vit.program, vit.tracking, plan, small, _images(1))
    before, after = small.state_dict(), repaired.program.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = ("weight", "bias")
    assert changed == {f"blocks.{block}.{layer}.{part}" for block in (0, 1) for layer in layers for part in parts}
    assert repaired.consumers == 2 * len(layers)
    assert _error(vit, repaired.program, _images(2)) < 0.7 * _error(vit, small, _images(2))


def test_nodes_with_a_twin_are_replaced_without_a_trace_through_the_layer_scale():
    net = tiny_vit()
    with torch.no_grad():
        for block in net.blocks:
            block.fc1.weight[1::2], block.fc1.bias[1::2] = block.fc1.weight[0::2], block.fc1.bias[0::2]
    backbone = tiny_vit_backbone(net)
    plan = _plan(backbone, NODES)
    small = cut(backbone.program, backbone.tracking, plan)
    repaired = repair(backbone.program, backbone.tracking, plan, small, _images(1), strength=1e-7)
    assert _error(backbone, small, _images(2)) > 0.1
    assert _error(backbone, repaired.program, _images(2)) < 1e-5


def test_errors_in_the_stream_are_made_good_in_the_units_of_the_stream(vit):
    """An offset in the stream, which the next consumer can undo only if the scale behind it is reckoned with."""
    plan = _plan(vit, NODES, blocks=(1,))
    small = cut(vit.program, vit.tracking, plan)
    with torch.no_grad():
        dict(small.named_parameters())["blocks.0.fc2.bias"].add_(torch.linspace(-1, 1, 24))
    repaired = repair(vit.program, vit.tracking, plan, small, _images(1), strength=1e-3).program
    with torch.no_grad():
        dense = vit.program(_images(2))
        before, after = ((program(_images(2)) - dense).mean(dim=0).abs().mean() for program in (small, repaired))
    assert after < 0.4 * before


def test_a_channel_that_the_scale_switches_off_keeps_its_weights():
    net = tiny_vit()
    with torch.no_grad():
        net.blocks[0].scale2[5] = 0
    backbone = tiny_vit_backbone(net)
    plan = _plan(backbone, HEADS, NODES)
    small = cut(backbone.program, backbone.tracking, plan)
    after = repair(backbone.program, backbone.tracking, plan, small, _images(1)).program.state_dict()
    before = small.state_dict()
    for part in ("weight", "bias"):
        same = (before[f"blocks.0.fc2.{part}"] == after[f"blocks.0.fc2.{part}"]).reshape(24, -1).all(dim=1)
        assert same.nonzero().flatten().tolist() == [5]
    assert all(value.isfinite().all() for value in after.values())


def test_heads_and_nodes_that_do_nothing_have_no_score(samples):
    net = tiny_vit()
    with torch.no_grad():
        net.blocks[0].attention.output.weight[:, 8:16] = 0  # the second head
        net.blocks[1].fc2.weight[:, 7] = 0
    backbone = tiny_vit_backbone(net)
    settings = ScoreSettings(iterations=3, batch_size=8)
    scores = learn_scores(backbone, samples, classes=CLASSES, seed=0, settings=settings).groups
    assert {name: len(values) for name, values in scores.items()} == backbone.layout.sizes
    heads, nodes = scores[HEADS.format(0)], scores[NODES.format(1)]
    assert heads[1] < 1e-6 < min(heads[0], heads[2])
    assert nodes[7] == 0
    assert (nodes > 0).sum() == 95
    plan = select(scores, backbone.layout, backbone.costs, 0.5)
    assert 1 not in plan.kept[HEADS.format(0)]


def test_every_block_keeps_a_head_and_a_step_of_nodes(vit, samples):
    settings = ScoreSettings(iterations=1, batch_size=8)
    scores = learn_scores(vit, samples, classes=CLASSES, seed=0, settings=settings).groups
    floor = vit.costs.parameters({HEADS.format(b): 1 for b in (0, 1)} | {NODES.format(b): 8 for b in (0, 1)})
    plan = select(scores, vit.layout, vit.costs, floor)
    assert [plan.counts[name.format(block)] for name in (HEADS, CHANNELS, NODES) for block in (0, 1)] == [
        1,
        1,
        8,
        8,
        8,
        8,
    ]


@pytest.mark.parametrize("with_repair", [True, False])
def test_recovery_needs_no_batch_normalisation(vit, samples, with_repair):
    plan = _plan(vit, HEADS, NODES)
    settings = RecoverSettings(iterations=40, learning_rate=1e-3, batch_size=24, repair=with_repair)
    done = recover_cut(vit, plan, samples, classes=CLASSES, settings=settings, seed=0)
    assert sum(done.losses[-5:]) < 0.8 * sum(done.losses[:5])
    again = recover_cut(vit, plan, samples, classes=CLASSES, settings=settings, seed=0)
    assert again.losses == done.losses


def test_a_transformer_is_scored_dense_and_recovered_slowly_unless_told_otherwise(vit, backbone, samples):
    def scores(of, **settings):
        settings = ScoreSettings(iterations=3, batch_size=8, **settings)
        return learn_scores(of, samples, classes=CLASSES, seed=0, settings=settings).groups

    def losses(of, **settings):
        settings = RecoverSettings(iterations=3, batch_size=8, **settings)
        return recover_cut(of, Plan.full(of.layout), samples, classes=CLASSES, settings=settings, seed=0).losses

    for of, share, rate in ((vit, 1.0, 1e-5), (backbone, 0.3, 3 * 5e-4 / 20)):
        by_default, told = scores(of), scores(of, least_share=share)
        assert all((by_default[name] == told[name]).all() for name in told)
        assert losses(of) == losses(of, learning_rate=rate)
    assert losses(vit) != losses(vit, learning_rate=5e-4)


def test_a_line_is_cut_out_of_a_piece_that_has_one_head_left(vit):
    layout = vit.layout
    outer = Plan.of(layout, {HEADS.format(0): [1], NODES.format(0): range(48), NODES.format(1): range(64)})
    stock = Stock(
        vit.fingerprint,
        layout.digest,
        tuple(Piece(plan, cut(vit.program, vit.tracking, plan)) for plan in (Plan.full(layout), outer)),
    )
    plan = Plan.of(layout, {**outer.kept, NODES.format(0): range(0, 48, 2)})
    blank = stock.blank(plan)
    assert stock.number_for(plan) == 1
    found = dict(cut(blank.program, blank.tracking, blank.plan).named_parameters())
    expected = dict(cut(vit.program, vit.tracking, plan).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
