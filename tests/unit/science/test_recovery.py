"""From a plan to a classifier, and the baselines that reuse is compared with."""

import numpy as np
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi_server.baselines import PLANNERS, Target, iterative, l1_plan
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.descent import default_rate
from kiridashi_server.recover.inputs import augment, shuffled_batches, training_batches
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from tiny_science import CLASSES, tiny_samples

FEW = tiny_samples(8, 0)
TEST = tiny_samples(30, 5)


@pytest.fixture(scope="module")
def plan(backbone):
    costs = CostModel.from_tracking(backbone.tracking)
    scores = {name: np.arange(size, dtype=np.float32) for name, size in backbone.layout.sizes.items()}
    return select(scores, backbone.layout, costs, 0.5)


def _recover(backbone, plan, seed=0, **settings):
    chosen = RecoverSettings(**{"iterations": 8, "learning_rate": 5e-3, **settings})
    return recover_cut(backbone, plan, FEW, classes=CLASSES, settings=chosen, seed=seed)


@pytest.mark.parametrize("repair", [True, False])
def test_the_same_seed_gives_the_same_model_and_leaves_everything_else_alone(backbone, plan, repair):
    fingerprint, state = backbone.fingerprint, torch.get_rng_state()
    first, again, other = (_recover(backbone, plan, seed, repair=repair) for seed in (0, 0, 1))
    assert first.losses == again.losses
    assert first.losses != other.losses
    weights = [list(result.model.state_dict().values()) for result in (first, again)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert backbone.fingerprint == fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_iterations_lower_the_loss_and_the_model_works(backbone, plan):
    result = _recover(backbone, plan, iterations=30)
    assert len(result.losses) == 30
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    assert accuracy(result.model, backbone, TEST) > 0.7
    assert not any(parameter.requires_grad for parameter in result.model.parameters())


def test_statistics_are_kept_after_a_repair_and_re_estimated_without(backbone, plan):
    def stem_mean(program):
        return dict(program.named_buffers())["stem_norm.running_mean"]

    kept = list(plan.kept["stem.weight"]) if "stem.weight" in plan.kept else list(plan.kept["stem"])
    dense = stem_mean(backbone.program)[kept]
    assert torch.equal(stem_mean(_recover(backbone, plan).model.features), dense)
    assert not torch.allclose(stem_mean(_recover(backbone, plan, repair=False).model.features), dense, atol=1e-3)


def test_no_iterations_is_the_closed_form_alone(backbone, plan):
    result = _recover(backbone, plan, iterations=0)
    assert result.losses == ()
    assert accuracy(result.model, backbone, TEST) > 1 / CLASSES


@pytest.mark.parametrize("change", [{"iterations": -1}, {"batch_size": 1}, {"ridge": 0.0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match="out of range"):
        RecoverSettings(**change)


def test_batches_show_every_sample_before_any_again():
    inputs = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    assert sorted(float(b[0, 0, 0]) for part in shuffled_batches(inputs, 4, generator) for b in part) == list(range(10))
    assert max(len(part) for part in shuffled_batches(inputs, 4, generator)) == 4
    batches = training_batches(inputs, torch.arange(10), 4, generator)
    seen = torch.cat([next(batches)[1] for _ in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_augmentation_changes_images_a_little_and_only_by_its_generator():
    batch = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, again = (augment(batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, batch)
    assert first.shape == batch.shape
    assert float((first.mean((1, 2, 3)) - batch.mean((1, 2, 3))).abs().max()) < 0.3


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_every_planner_meets_the_size_and_depends_on_its_seed_only(backbone, name):
    costs = CostModel.from_tracking(backbone.tracking)
    plans = [PLANNERS[name](backbone, Target(FEW, CLASSES, 0.5, seed)) for seed in (0, 0)]
    assert plans[0] == plans[1]
    assert 0.3 < costs.parameters(plans[0].counts) / costs.parameters({}) <= 0.5


def test_l1_keeps_the_strongest_filters(backbone):
    plan = l1_plan(backbone, Target(FEW, CLASSES, 0.5, 0))
    group = next(group for group in backbone.layout.groups if group.size == 32)
    norms = dict(backbone.program.named_parameters())["top.weight"].detach().abs().flatten(1).sum(1).numpy()
    kept = list(plan.kept[group.name])
    assert norms[kept].min() >= np.delete(norms, kept).max()
    shares = [count / backbone.layout.sizes[name] for name, count in plan.counts.items()]
    assert max(shares) - min(shares) <= 0.51  # the same share of every group, up to the rounding of 16 units to 8


def test_iterative_pruning_reaches_the_size_and_counts_what_it_took(backbone):
    costs = CostModel.from_tracking(backbone.tracking)
    rounds = []
    result = iterative(
        backbone,
        Target(FEW, CLASSES, 0.5, 0),
        RecoverSettings(iterations=3),
        rounds=2,
        progress=lambda done, total: rounds.append((done, total)),
    )
    plan = result.recovered.plan
    assert costs.parameters(plan.counts) <= 0.5 * costs.parameters({})
    assert result.extra_iterations == 3
    assert rounds == [(1, 2), (2, 2)]
    plan.validate(backbone.layout)
    assert plan != Plan.full(backbone.layout)
    features = sum(p.numel() for p in result.recovered.model.features.parameters())
    assert features == costs.parameters(plan.counts)
    with pytest.raises(InputError, match="at least one round"):
        iterative(backbone, Target(FEW, CLASSES, 0.5, 0), RecoverSettings(), rounds=0)


def test_the_rate_grows_with_the_iterations_up_to_a_limit(backbone):
    rates = [default_rate(backbone.program, count) for count in (5, 20, 40, 100)]
    assert rates == pytest.approx([1.25e-4, 5e-4, 1e-3, 1e-3])
    with pytest.raises(InputError):
        RecoverSettings(iterations=5, learning_rate=0.0)


def test_half_of_the_way_is_gone(backbone, plan):
    none, half, all_of_it = (
        dict(_recover(backbone, plan, **settings).model.named_parameters())
        for settings in ({"iterations": 0}, {"way": 0.5}, {"way": 1.0})
    )
    assert any(not torch.equal(none[name], all_of_it[name]) for name in none)
    for name in none:
        assert torch.allclose(half[name], (none[name] + all_of_it[name]) / 2, atol=1e-6)
    for wrong in (0.0, 1.1):
        with pytest.raises(InputError, match="way"):
            RecoverSettings(way=wrong)
