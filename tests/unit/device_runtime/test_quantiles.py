"""Intervals of quantiles: their coverage on streams whose quantiles are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kiridashi_agent.quantiles import independent_runs, quantile_interval
from kiridashi_agent.ratios import ratios
from numpy.typing import NDArray

NORMAL = {0.5: 0.0, 0.95: 1.6448536, 0.99: 2.3263479}


def stream(n: int, memory: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A stationary Gaussian series with lag-one correlation ``memory``, as latencies: exp of it."""
    noise = rng.normal(0, math.sqrt(1 - memory**2), n)
    values = np.empty(n)
    values[0] = rng.normal()
    for i in range(1, n):
        values[i] = memory * values[i - 1] + noise[i]
    return np.exp(values)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_intervals_cover_the_true_quantile(level: float, memory: float) -> None:
    rng = np.random.default_rng(7)
    covered, narrow = 0, []
    for _ in range(150):
        interval = quantile_interval(stream(2000, memory, rng), level)
        assert interval is not None
        covered += interval[0] <= math.exp(NORMAL[level]) <= interval[1]
        narrow.append(interval[1] / interval[0])
    assert covered / 150 >= 0.9
    assert np.median(narrow) < 3


def test_intervals_that_take_the_runs_for_independent_are_too_narrow() -> None:
    rng = np.random.default_rng(8)
    covered = 0
    for _ in range(150):
        series = stream(2000, 0.8, rng)
        interval = quantile_interval(rng.permutation(series), 0.5)  # the same values, their order forgotten
        assert interval is not None
        covered += interval[0] <= 1.0 <= interval[1]
    assert covered / 150 < 0.85


def test_dependent_runs_are_worth_fewer() -> None:
    rng = np.random.default_rng(0)
    assert independent_runs(stream(2000, 0.0, rng)) > 1500
    # The median's indicator of a series with correlation r has 2/pi * asin(r) at lag one: about 0.59 here.
    assert 150 < independent_runs(stream(2000, 0.8, rng)) < 800
    assert independent_runs(np.ones(50)) == 50
    assert independent_runs(np.array([1.0])) == 1


def test_too_few_runs_bound_no_high_quantile() -> None:
    times = np.random.default_rng(0).gamma(9, 1, 100)
    assert quantile_interval(times, 0.5) is not None
    assert quantile_interval(times, 0.99) is None
    assert quantile_interval(np.array([1.0, 2.0]), 0.5) is None


def test_ranks_of_independent_runs_are_those_of_the_binomial_distribution() -> None:
    # For n = 10 the textbook's interval of the median is between the 2nd and the 9th value (97.9 %).
    times = np.array([3.0, 1.0, 10.0, 7.0, 5.0, 2.0, 8.0, 6.0, 4.0, 9.0])
    assert independent_runs(times) == 10
    assert quantile_interval(times, 0.5) == pytest.approx((2.0, 9.0))


def turns(rounds: int, factors: list[float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Turns of models on a machine whose speed drifts by a third, each turn with 2 % noise of its own."""
    drift = 1 + 0.3 * np.sin(np.linspace(0, 9, rounds))
    return drift[:, None] * np.array(factors) * np.exp(rng.normal(0, 0.02, (rounds, len(factors))))


def test_a_ratio_is_found_on_a_machine_that_drifts() -> None:
    rng = np.random.default_rng(3)
    equal, slower = ratios(turns(100, [2.0, 2.0, 2.1], rng), rng)
    assert equal.low < 1 < equal.high
    assert slower.low > 1.03
    assert slower.value == pytest.approx(1.05, abs=0.01)
    assert slower.high - slower.low < 0.04


def test_equal_models_are_seldom_called_different() -> None:
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(100):
        found = ratios(turns(60, [1.0, 1.0, 1.0], rng), rng)
        wrong += any(not ratio.low <= 1 <= ratio.high for ratio in found)
    assert wrong <= 12
