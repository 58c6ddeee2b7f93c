"""Score learning and first-order scores: what they must find, and what they must leave alone."""

import copy

import numpy as np
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.amp.taylor import taylor_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.gates import insert_gates
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.ridge import fit_ridge_head
from tiny_science import CLASSES, SIDE, tiny_net, tiny_samples
from torch.nn import functional

SETTINGS = ScoreSettings(iterations=6, batch_size=8)


def _learn(backbone, seed=0, settings=SETTINGS):
    return learn_scores(backbone, tiny_samples(8, 0), classes=CLASSES, seed=seed, settings=settings)


def test_every_group_has_scores_and_the_same_seed_gives_the_same(backbone):
    first, again, other = _learn(backbone), _learn(backbone), _learn(backbone, seed=1)
    assert {name: len(values) for name, values in first.groups.items()} == backbone.layout.sizes
    for name, values in first.groups.items():
        assert values.dtype == np.float32
        assert (values == again.groups[name]).all()
        assert not (values == other.groups[name]).all()
    assert first.iterations == 6
    assert first.seconds > 0


def test_the_backbone_and_the_global_generator_stay_as_they_are(backbone):
    fingerprint, state = backbone.fingerprint, torch.get_rng_state()
    before = copy.deepcopy(backbone.program.state_dict())
    _learn(backbone)
    after = backbone.program.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert backbone.fingerprint == fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_units_that_nothing_reads_score_lowest_and_are_let_go():
    net = tiny_net()
    dead = list(range(0, 48, 3))
    with torch.no_grad():
        net.project.weight[:, dead] = 0
    scores = _learn(Backbone.from_module(net, torch.zeros(1, 3, SIDE, SIDE), name="half dead")).groups
    name = next(name for name, values in scores.items() if len(values) == 48)
    assert (scores[name][dead] == 0).all()
    assert (np.delete(scores[name], dead) > 0).all()


def test_masked_out_units_go_on_earning_score(backbone):
    one, many = (_learn(backbone, settings=ScoreSettings(iterations=n, least_share=0.4)) for n in (1, 8))
    for name, values in many.groups.items():
        # After n steps the score is a root mean square; 1/sqrt(8) of the first one is what a unit keeps without more.
        assert (values >= one.groups[name] / np.sqrt(8) * (1 - 1e-5)).all()
        assert (values > one.groups[name] / np.sqrt(8) * (1 + 1e-5)).mean() > 0.9


def test_accuracies_are_of_the_validation_samples(backbone):
    scores = learn_scores(
        backbone,
        tiny_samples(8, 0),
        classes=CLASSES,
        seed=0,
        settings=SETTINGS,
        validation=tiny_samples(20, 9),
    )
    assert scores.dense_accuracy > 0.6
    assert set(scores.masked_accuracy) == {0.5, 0.3}
    assert all(accuracy * 60 == pytest.approx(round(accuracy * 60)) for accuracy in scores.masked_accuracy.values())


def test_progress_counts_every_iteration(backbone):
    seen = []
    samples = tiny_samples(4, 0)
    learn_scores(
        backbone,
        samples,
        classes=CLASSES,
        seed=0,
        settings=SETTINGS,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("change", [{"iterations": 0}, {"least_share": 0.0}, {"head_learning_rate": -1.0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match="out of range"):
        ScoreSettings(**change)


def test_images_of_another_size_are_refused(backbone):
    with pytest.raises(InputError, match="8 x 8"):
        to_input(backbone, np.zeros((1, 8, 8, 3), dtype=np.uint8))


def test_taylor_is_the_root_mean_square_of_numeric_gate_derivatives(backbone):
    samples = tiny_samples(2, 0)
    inputs, labels = to_input(backbone, samples.images), torch.from_numpy(samples.labels)
    head = fit_ridge_head(run_batched(backbone.program, inputs).numpy(), samples.labels, CLASSES)
    scores = taylor_scores(
        backbone.program,
        backbone.tracking,
        head,
        inputs,
        labels,
        generator=torch.Generator().manual_seed(0),
        micro_batch=1,
    )
    gated, linear = insert_gates(backbone.program, backbone.tracking), head.as_linear()
    name = max(scores, key=lambda key: len(scores[key]))
    for unit in (0, 7):
        losses = []
        for value in (1 + 1e-2, 1 - 1e-2):
            gate = torch.ones(len(scores[name]))
            gate[unit] = value
            with torch.no_grad():
                logits = linear(gated(inputs, {name: gate}))
            losses.append(functional.cross_entropy(logits, labels, reduction="none").double())
        slopes = (losses[0] - losses[1]) / 2e-2
        assert scores[name][unit] == pytest.approx(float(slopes.square().mean().sqrt()), rel=0.05, abs=1e-4)
