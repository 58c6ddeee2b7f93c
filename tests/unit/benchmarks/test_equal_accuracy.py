"""Curves of accuracy over latency, and what they say about speed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.equal_accuracy import Curve, Cuts, Trial, advantage, better, estimate, isotonic, speed


def trial(seed: int, latencies: dict[str, list[float]]) -> Trial:
    """A trial whose accuracies rise with the number of the cut, the same for all methods."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(120)
    methods = {
        name: Cuts(np.array(values), np.stack([difficulty < 0.3 + 0.15 * place for place in range(len(values))]))
        for name, values in latencies.items()
    }
    return Trial(np.arange(120) // 4, methods)


def curve(latency_ms: list[float], accuracy: list[float]) -> Curve:
    return Curve(np.log(latency_ms), np.array(accuracy))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_isotonic_is_the_projection_on_sequences_that_do_not_fall(values: list[float]) -> None:
    fitted = isotonic(np.array(values))

    assert (np.diff(fitted) >= -1e-9).all()
    rest = np.array(values) - fitted
    assert rest @ fitted == pytest.approx(0, abs=1e-6)  # a projection on a cone: what is left is orthogonal to it
    assert (np.cumsum(rest[::-1]) <= 1e-6).all()  # and no direction of the cone points towards it


def test_twice_the_latency_for_the_same_accuracies_is_half_the_speed() -> None:
    ours = curve([1, 2, 4], [0.3, 0.5, 0.6])

    assert speed(ours, curve([2, 4, 8], [0.3, 0.5, 0.6])) == pytest.approx(2)
    assert speed(ours, curve([0.5, 1, 2], [0.3, 0.5, 0.6])) == pytest.approx(0.5)


def test_on_a_plateau_the_smallest_latency_counts() -> None:
    ours = curve([1, 2, 8], [0.3, 0.5, 0.5])

    assert speed(ours, curve([1, 2], [0.3, 0.5])) == pytest.approx(1)


def test_curves_without_a_common_accuracy_have_no_ratio() -> None:
    assert np.isnan(speed(curve([1, 2], [0.3, 0.4]), curve([1, 2], [0.5, 0.6])))


def test_advantage_and_the_better_of_two() -> None:
    low, high = curve([1, 4], [0.3, 0.5]), curve([1, 4], [0.4, 0.4])

    assert advantage(curve([1, 4], [0.5, 0.7]), low) == pytest.approx(0.2)
    best = better(low, high)
    assert best.accuracy[0] == pytest.approx(0.4)
    assert best.accuracy[-1] == pytest.approx(0.5)


def test_the_better_of_two_that_share_no_latency_is_each_where_it_is() -> None:
    best = better(curve([1, 2], [0.2, 0.3]), curve([4, 8], [0.1, 0.5]))

    assert (np.diff(best.log_ms) > 0).all()
    assert (np.diff(best.accuracy) >= 0).all()
    assert np.interp(np.log([1, 2, 3, 8]), best.log_ms, best.accuracy) == pytest.approx([0.2, 0.3, 0.3, 0.5], abs=0.01)


def test_the_interval_covers_a_known_ratio_and_repeats() -> None:
    trials = [trial(seed, {"ours": [1, 2, 3], "other": [1.5, 3, 4.5]}) for seed in range(4)]
    statistics = {"speed": lambda curves: speed(curves["ours"], curves["other"])}

    first, again = (estimate(trials, statistics, seed=0)["speed"] for _ in range(2))

    assert first == again
    assert first.value == pytest.approx(1.5, rel=0.01)
    assert first.ci95 is not None
    assert first.ci95[0] <= 1.5 <= first.ci95[1]


def test_no_interval_where_there_is_no_value() -> None:
    trials = [trial(0, {"ours": [1, 2, 3], "other": [1, 2, 3]})]

    found = estimate(trials, {"none": lambda curves: float("nan")}, seed=0)["none"]

    assert (found.value, found.ci95) == (None, None)
