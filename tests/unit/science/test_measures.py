"""Measures on masked features, scores and moments, against direct computations of their definitions."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.kernel_distance import KernelDistance, gaussian_discrepancy
from kiridashi_server.similarity.log_evidence import LogMe, log_evidence, logme
from kiridashi_server.similarity.measure import MEASURES, find_measure, what_is_missing
from kiridashi_server.similarity.neighbours import Neighbours, neighbour_share
from kiridashi_server.similarity.score_ranks import ScoreRanks, score_correlation, spearman
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, spearmanr
from tiny_science import make_record


def _direct(features, targets, a, b):
    """The evidence as what it is: the density of y under N(0, I/b + F F'/a)."""
    covariance = np.eye(len(targets)) / b + features @ features.T / a
    return multivariate_normal(np.zeros(len(targets)), covariance).logpdf(targets)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20)])
def test_log_evidence_is_the_marginal_density_whatever_n_and_d(shape):
    generator = np.random.default_rng(0)
    features, targets = generator.normal(size=shape), generator.normal(size=shape[0])
    for a, b in ((1.0, 1.0), (30.0, 0.2), (0.01, 5.0)):
        assert log_evidence(features, targets, a, b) == pytest.approx(_direct(features, targets, a, b), rel=1e-9)


@pytest.mark.parametrize("shape", [(24, 60), (60, 8)])
def test_logme_is_the_evidence_at_its_maximum(shape):
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(2), shape[0] // 2)
    features = generator.normal(size=shape) + 0.8 * labels[:, None] * (np.arange(shape[1]) < 3)
    found = logme(features.astype(np.float32), labels)
    exact = features.astype(np.float32).astype(np.float64)
    best = []
    for c in range(2):
        targets = (labels == c).astype(float)
        search = minimize(lambda x, y=targets: -_direct(exact, y, *np.exp(x)), np.zeros(2), method="Nelder-Mead")
        best.append(-search.fun / shape[0])
    assert found == pytest.approx(np.mean(best), abs=1e-4)


def test_columns_of_zeros_such_as_masked_features_change_nothing():
    generator = np.random.default_rng(2)
    features, labels = generator.normal(size=(15, 6)).astype(np.float32), np.arange(15) % 3
    padded = np.hstack([features, np.zeros((15, 50), dtype=np.float32)])
    assert logme(padded, labels) == pytest.approx(logme(features, labels), rel=1e-6)
    assert neighbour_share(padded, labels) == neighbour_share(features, labels)


@given(st.integers(0, 10_000), st.integers(4, 25), st.integers(1, 30), st.integers(1, 5))
def test_neighbours_are_those_of_brute_force(seed, count, width, k):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, width)).astype(np.float32)
    labels = generator.integers(0, 3, count)
    shares = []
    for i in range(count):
        others = sorted((float(np.linalg.norm(features[i] - features[j])), j) for j in range(count) if j != i)
        nearest = [labels[j] == labels[i] for _, j in others[:k]]
        shares.append(np.mean(nearest))
    assert neighbour_share(features, labels, k) == pytest.approx(np.mean(shares))


def test_neighbours_of_random_labels_reach_the_zero_point():
    generator = np.random.default_rng(3)
    labels, record = np.arange(60) % 4, make_record()
    values = []
    for _ in range(60):
        masked = {record.id: generator.normal(size=(60, 5)).astype(np.float32)}
        target = Descriptor(np.zeros((60, 4), np.float32), labels, masked)
        values.append(Neighbours().similarity(record, target))
    assert np.mean(values) == pytest.approx(Neighbours().zero_point(target), abs=0.015)


def test_rank_correlation_is_spearmans_with_ties_and_zero_where_nothing_varies():
    generator = np.random.default_rng(4)
    first, second = generator.integers(0, 5, 30), generator.integers(0, 5, 30)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman(first, np.ones(30)) == 0


def test_score_correlation_weighs_groups_by_units_and_ignores_their_scale():
    first = {"a": np.arange(4.0), "b": np.arange(12.0), "alone": np.ones(3)}
    second = {"a": 1e3 * np.arange(4.0), "b": -np.arange(12.0)}
    assert score_correlation(first, second) == pytest.approx((4 - 12) / 16)
    assert score_correlation({"a": first["a"]}, {"b": first["b"]}) == 0


def test_the_discrepancy_of_gaussians_is_that_of_their_samples():
    generator = np.random.default_rng(5)
    p, u, q, v, h = np.array([0.0, 1]), np.array([1.0, 0.5]), np.array([0.7, 0.2]), np.array([0.3, 2]), 3.0

    def kernel(x, y):
        return np.exp(-((x - y) ** 2).sum(axis=1) / (2 * h)).mean()

    draws = [
        generator.normal(mean, np.sqrt(variance), (200_000, 2)) for mean, variance in ((p, u), (p, u), (q, v), (q, v))
    ]
    sampled = kernel(draws[0], draws[1]) + kernel(draws[2], draws[3]) - 2 * kernel(draws[0], draws[2])
    assert gaussian_discrepancy((p, u), (q, v), h) == pytest.approx(sampled, abs=2e-3)
    assert gaussian_discrepancy((p, u), (p, u), h) == pytest.approx(0, abs=1e-12)


def test_mmd_falls_with_distance():
    features = np.random.default_rng(6).normal(0, 1, (200, 4)).astype(np.float32)
    labels = np.zeros(200, dtype=np.int64)
    near, far = (KernelDistance().similarity(make_record(), Descriptor(features + s, labels)) for s in (0, 2))
    assert far < near <= 1e-12


def test_the_own_mask_tells_records_apart_where_dense_features_cannot():
    generator = np.random.default_rng(7)
    labels = np.arange(30) % 3
    telling = (3 * np.eye(3)[labels] + generator.normal(0, 0.3, (30, 3))).astype(np.float32)
    good, bad = make_record("good"), make_record("bad")
    masked = {good.id: telling, bad.id: telling[generator.permutation(30)]}
    target = Descriptor(telling, labels, masked)
    for measure in (LogMe(), Neighbours()):
        assert measure.similarity(good, target) > measure.similarity(bad, target) + 0.1


def test_every_measure_says_what_it_lacks_and_works_with_it():
    record, labels = make_record(), np.arange(12) % 3
    features = np.random.default_rng(8).normal(size=(12, 4)).astype(np.float32)
    bare = Descriptor(features, labels)
    assert {name for name in MEASURES if what_is_missing(find_measure(name), record, bare)} == {
        "logme",
        "knn",
        "score-ranks",
    }
    scored = dataclasses.replace(record, taylor=record.scores)
    full = Descriptor(features, labels, {scored.id: features}, scored.scores)
    for measure in MEASURES.values():
        assert what_is_missing(measure, scored, full) is None
        assert np.isfinite(measure.similarity(scored, full))
    assert ScoreRanks().similarity(scored, full) == pytest.approx(6 / 10 * 0 + 4 / 10)  # group "b" is constant
