"""Measures against their definitions, and where they must and must not see a difference."""

import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.frechet import Frechet
from kiridashi_server.similarity.loo_leep import LooLeep, label_entropy, loo_leep
from kiridashi_server.similarity.measure import MEASURES, find_measure
from tiny_science import make_record


def _random_source(generator, count, classes):
    source = generator.dirichlet(np.ones(classes), count)
    return source, generator.integers(0, 4, count)


def test_loo_leep_is_the_definition_with_each_sample_really_left_out():
    generator = np.random.default_rng(0)
    source, labels = _random_source(generator, 15, 5)
    prior, shares = 0.7, np.bincount(labels) / 15
    total = 0.0
    for i in range(15):
        others = [k for k in range(15) if k != i]
        table = np.array(
            [
                (sum(source[k, z] for k in others if labels[k] == labels[i]) + prior * shares[labels[i]])
                / (sum(source[k, z] for k in others) + prior)
                for z in range(5)
            ]
        )
        total += np.log(table @ source[i])
    assert loo_leep(source, labels, prior) == pytest.approx(total / 15, rel=1e-12)


@pytest.mark.parametrize("classes", [4, 10, 100])
def test_random_labels_are_never_flattered_however_many_source_classes(classes):
    generator = np.random.default_rng(1)
    values = [loo_leep(*_random_source(generator, 40, classes)) for _ in range(20)]
    assert np.mean(values) < -np.log(4) + 0.05


def test_a_source_class_without_mass_is_no_division_by_zero():
    source = np.zeros((6, 3))
    source[:, 0] = 1
    assert np.isfinite(loo_leep(source, np.array([0, 1, 0, 1, 0, 1])))


def test_a_head_that_separates_the_target_beats_the_zero_point_and_a_shuffled_one_does_not():
    generator = np.random.default_rng(2)
    labels = np.repeat(np.arange(3), 10)
    features = (4 * np.eye(3, 4)[labels] + generator.normal(0, 0.3, (30, 4))).astype(np.float32)
    record, measure = make_record(head=3 * np.eye(3, 4)), LooLeep()
    telling = Descriptor(features, labels)
    silent = Descriptor(features, generator.permutation(labels))
    assert measure.similarity(record, telling) > measure.zero_point(telling) + 0.5
    assert measure.similarity(record, silent) < measure.zero_point(silent) + 0.1
    assert measure.zero_point(telling) == pytest.approx(-np.log(3))


def test_entropy_ignores_classes_without_samples():
    assert label_entropy(np.array([0, 0, 3, 3])) == pytest.approx(np.log(2))


def test_frechet_is_zero_for_equal_moments_and_falls_with_distance():
    generator = np.random.default_rng(3)
    features = generator.normal(0, 1, (500, 4))
    features = ((features - features.mean(0)) / features.std(0)).astype(np.float32)
    labels, record = np.zeros(500, dtype=np.int64), make_record()
    near, far = (Frechet().similarity(record, Descriptor(features + shift, labels)) for shift in (0, 2))
    assert near == pytest.approx(0, abs=1e-6)
    assert far == pytest.approx(-4.0, rel=1e-4)


def test_measures_are_found_by_name():
    assert all(find_measure(name).name == name for name in MEASURES)
    with pytest.raises(InputError, match="no similarity measure 'gut-feeling'"):
        find_measure("gut-feeling")
