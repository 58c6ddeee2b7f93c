"""Cluster bootstrap intervals: coverage, width, pairing."""

import time

import numpy as np
import pytest
from kiridashi_server.tasks import TaskError, accuracy_interval, paired_difference_interval


def test_the_mean_is_over_samples() -> None:
    correct = np.array([True, True, True, False, False])
    interval = accuracy_interval(correct, np.array([0, 0, 0, 1, 2]), seed=0)
    assert interval.mean == pytest.approx(0.6)
    assert interval.low <= interval.mean <= interval.high


def test_views_of_one_drawing_do_not_narrow_the_interval() -> None:
    """Repeating every sample ten times within its cluster tells nothing new."""
    once = np.random.default_rng(0).random(40) < 0.7
    clusters = np.arange(40)
    single = accuracy_interval(once, clusters, seed=1)
    repeated = accuracy_interval(np.repeat(once, 10), np.repeat(clusters, 10), seed=1)
    assert repeated == pytest.approx(single)
    naive = accuracy_interval(np.repeat(once, 10), np.arange(400), seed=1)
    assert naive.high - naive.low < 0.5 * (repeated.high - repeated.low)


def test_coverage_is_near_the_level() -> None:
    """Simulated accuracies that differ from drawing to drawing: about 95 % of the intervals cover the mean of all."""
    generator = np.random.default_rng(7)
    trials, covered = 200, 0
    for trial in range(trials):
        difficulty = generator.beta(3, 2, size=40)
        correct = (generator.random((40, 6)) < difficulty[:, None]).ravel()
        interval = accuracy_interval(correct, np.repeat(np.arange(40), 6), seed=trial)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.90 <= covered / trials <= 0.985


def test_pairing_removes_what_both_share() -> None:
    generator = np.random.default_rng(5)
    hard = np.repeat(generator.random(36) < 0.5, 8)
    a, b = hard.copy(), hard.copy()
    b[::16] = False
    interval = paired_difference_interval(a, b, np.repeat(np.arange(36), 8), seed=0)
    assert interval.mean == pytest.approx(a.mean() - b.mean())
    alone = accuracy_interval(a, np.repeat(np.arange(36), 8), seed=0)
    assert interval.high - interval.low < 0.3 * (alone.high - alone.low)
    mirrored = paired_difference_interval(b, a, np.repeat(np.arange(36), 8), seed=0)
    assert mirrored.low == pytest.approx(-interval.high)


def test_names_serve_as_clusters_and_the_seed_decides() -> None:
    correct = np.random.default_rng(2).random(78) < 0.5
    numbers = np.repeat(np.arange(12), np.arange(1, 13))
    names = [f"style/{number:02d}" for number in numbers]
    assert accuracy_interval(correct, names, seed=3) == accuracy_interval(correct, numbers, seed=3)
    assert accuracy_interval(correct, numbers, seed=3) != accuracy_interval(correct, numbers, seed=4)


def test_a_lower_level_is_narrower() -> None:
    correct = np.random.default_rng(2).random(60) < 0.5
    wide = accuracy_interval(correct, np.arange(60), seed=3)
    narrow = accuracy_interval(correct, np.arange(60), seed=3, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_it_is_quick() -> None:
    correct = np.random.default_rng(2).random(1000) < 0.5
    clusters = np.repeat(np.arange(100), 10)
    accuracy_interval(correct, clusters, seed=0)
    started = time.process_time()
    accuracy_interval(correct, clusters, seed=0)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize(
    ("samples", "clusters", "level"),
    [(4, [0, 0, 1], 0.95), (4, [0, 0, 0, 0], 0.95), (4, [0, 0, 1, 1], 1.0), (0, [], 0.95)],
)
def test_senseless_requests_are_refused(samples: int, clusters: list[int], level: float) -> None:
    with pytest.raises(TaskError):
        accuracy_interval(np.ones(samples, dtype=bool), np.asarray(clusters), seed=0, level=level)


def test_a_paired_comparison_needs_the_same_samples() -> None:
    with pytest.raises(TaskError, match="same samples"):
        paired_difference_interval(np.ones(4, dtype=bool), np.ones(3, dtype=bool), np.arange(4), seed=0)
