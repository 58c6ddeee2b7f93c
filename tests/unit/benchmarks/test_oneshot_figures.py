"""Paired gains, their intervals, Holm's correction, and what is left out of a comparison."""

import numpy as np
import pytest

from benchmarks.oneshot_figures import Comparison, gain, holm, over_seeds, p_value, tabulate


def row(method: str, task: str, accuracy: float, *, seed: int = 0, limit: str = "30", iterations: int = 50) -> dict:
    return {
        "method": method,
        "task": task,
        "seed": seed,
        "limit": limit,
        "iterations": iterations,
        "accuracy": accuracy,
    }


def test_a_gain_is_the_paired_mean_with_its_t_interval():
    ours, other = np.array([0.5, 0.6, 0.7, 0.9]), np.array([0.4, 0.4, 0.6, 0.7])
    found = gain(ours, other)
    # Differences 10, 20, 10, 20 points: mean 15, standard error sqrt(100 / 3 / 4), t(0.975, 3) = 3.182.
    assert found.value == pytest.approx(15)
    assert found.ci95 == pytest.approx((15 - 3.18245 * np.sqrt(100 / 12), 15 + 3.18245 * np.sqrt(100 / 12)), rel=1e-4)
    assert gain(ours[:1], other[:1]).ci95 is None


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        other = rng.random(8)
        low, high = gain(other + 0.03 + rng.normal(0, 0.05, 8), other).ci95 or (0, 0)
        inside += low <= 3 <= high
    assert 925 <= inside <= 975


def test_nothing_that_differs_has_no_small_p():
    same = np.array([0.1, 0.2, 0.3])
    assert p_value(same, same) == 1
    assert p_value(same + np.array([0.1, 0.11, 0.09]), same) < 0.01


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1, "b": 1})


def test_seeds_are_averaged_and_what_is_not_whole_is_left_out():
    rows = [row(method, task, value, seed=seed) for method, task, seed, value in [
        ("product", "x", 0, 0.8), ("product", "x", 1, 0.6), ("product", "y", 0, 0.5), ("product", "y", 1, 0.5),
        ("l1", "x", 0, 0.4), ("l1", "x", 1, 0.4), ("l1", "y", 0, 0.3), ("l1", "y", 1, 0.1),
        ("taylor", "x", 0, 0.4), ("taylor", "y", 0, 0.4),
    ]]  # fmt: skip
    table = tabulate(rows)
    product, l1, taylor = ("product", "30", 50), ("l1", "30", 50), ("taylor", "30", 50)
    assert set(table) == {product, l1, taylor}
    assert over_seeds(table, product) == pytest.approx([0.7, 0.5])
    comparison = Comparison(("product", 50), ("l1", "taylor"), 50)
    figures = comparison.gains(table)
    assert set(figures) == set(comparison.p_values(table)) == {"l1@30", "taylor@30"}
    assert figures["l1@30"].value == pytest.approx(30)
    # Of Taylor there is only seed 0, where the product has 0.8 and 0.5.
    assert figures["taylor@30"].value == pytest.approx(25)
    assert 1 not in tabulate(rows[:-3])["l1", "30", 50]  # one task of seed 1 is missing
    assert Comparison(("product", 50), ("l1",), 20).gains(table) == {}
    assert Comparison(("product", 0), ("l1",), 50).gains(table) == {}


def test_sizes_are_compared_apart():
    rows = [row(m, t, v, limit=k) for m, t, v, k in [
        ("product", "x", 0.8, "30"), ("product", "y", 0.7, "30"),
        ("product", "x", 0.5, "15"), ("product", "y", 0.4, "15"),
        ("l1", "x", 0.6, "30"), ("l1", "y", 0.5, "30"), ("l1", "x", 0.6, "15"), ("l1", "y", 0.5, "15"),
    ]]  # fmt: skip
    figures = Comparison(("product", 50), ("l1",), 50).gains(tabulate(rows))
    assert {name: round(figure.value or 0) for name, figure in figures.items()} == {"l1@30": 20, "l1@15": -10}


def test_ours_may_have_fewer_iterations_than_the_rivals():
    rows = [row("product", task, value, iterations=0) for task, value in (("x", 0.8), ("y", 0.7))]
    rows += [row("l1", task, value) for task, value in (("x", 0.6), ("y", 0.6))]
    assert Comparison(("product", 0), ("l1",), 50).gains(tabulate(rows))["l1@30"].value == pytest.approx(15)
