"""Bounds that hold as often as they say, and verdicts that follow from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError
from kiridashi_server.similarity.conformal import (
    VerdictSettings,
    calibrate,
    calibrate_gains,
    coverage,
    tasks_needed,
    tasks_to_fit,
    verdict,
)

SETTINGS = VerdictSettings()


@pytest.mark.parametrize(("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.3, 3)])
def test_the_fewest_tasks_are_those_with_a_finite_bound(alpha, needed):
    assert tasks_needed(alpha) == needed
    assert np.isfinite(calibrate(np.arange(needed, dtype=float), alpha))
    assert calibrate(np.arange(needed - 1, dtype=float), alpha) == np.inf


@pytest.mark.parametrize(("count", "alpha"), [(9, 0.1), (19, 0.1), (25, 0.2), (14, 0.1)])
def test_a_new_residual_stays_below_as_often_as_exchangeability_promises(count, alpha):
    """The share of draws is k / (n + 1) exactly, so a quantile one rank too low or too high is seen."""
    draws = np.random.default_rng(0).gamma(1.5, size=(40_000, count + 1))
    kept = (draws[:, -1] <= calibrate(draws[:, :-1], alpha)).mean()
    rank = int(np.ceil((count + 1) * (1 - alpha) - 1e-9))
    assert kept == pytest.approx(rank / (count + 1), abs=4 * np.sqrt(alpha * (1 - alpha) / 40_000))
    assert kept >= 1 - alpha - 0.006
    too_low = np.quantile(draws[:, :-1], 1 - alpha, axis=1)
    assert (draws[:, -1] <= too_low).mean() < kept - 0.01


@given(st.lists(st.floats(-1, 1), min_size=9, max_size=40), st.floats(-3, 3))
def test_the_quantile_moves_with_its_residuals_and_ignores_their_order(residuals, shift):
    values = np.array(residuals)
    assert calibrate(values[::-1].copy(), 0.1) == calibrate(values, 0.1)
    assert calibrate(values + shift, 0.1) == pytest.approx(calibrate(values, 0.1) + shift)
    assert (values <= calibrate(values, 0.1)).mean() >= 0.9


def _tasks(count, slope, noise, seed, offset=0.0):
    generator = np.random.default_rng(seed)
    statistics = generator.normal(size=(count, 3))
    return offset + slope * statistics[:, 0] + noise * generator.standard_t(3, count), statistics


def test_a_bank_that_always_helps_is_reused_and_one_that_always_hurts_is_not():
    for offset, name in ((0.1, "reuse"), (-0.1, "fallback")):
        gains, statistics = _tasks(9, 0.0, 0.005, 0, offset)
        found = verdict(calibrate_gains(gains, statistics, SETTINGS), np.zeros(3), SETTINGS)
        assert found.name == name
        assert found.lower <= offset <= found.upper
        assert "9 tasks" in found.reason
        assert f"{100 * found.lower:+.1f}" in found.reason


def test_gains_of_both_signs_are_blended():
    gains = np.linspace(-0.2, 0.2, 12)
    found = verdict(calibrate_gains(gains, np.zeros((12, 3)), SETTINGS), np.zeros(3), SETTINGS)
    assert (found.name, found.expected) == ("blend", 0.0)
    assert found.lower == pytest.approx(-0.2)


def test_too_few_tasks_bound_nothing_and_are_blended():
    gains, statistics = _tasks(8, 0.0, 0.0, 0, 0.3)
    found = verdict(calibrate_gains(gains, statistics, SETTINGS), np.zeros(3), SETTINGS)
    assert (found.name, found.lower, found.upper) == ("blend", -np.inf, np.inf)
    assert "unknown" in found.reason


def test_what_the_statistics_foretell_narrows_the_bounds():
    gains, statistics = _tasks(120, 0.1, 0.005, 1)
    fitted = calibrate_gains(gains, statistics, SETTINGS)
    assert fitted.tasks == 80
    assert fitted.slope[0] > 3 * abs(fitted.slope[1:]).max()
    blind = calibrate_gains(gains, np.zeros((120, 3)), SETTINGS)
    assert fitted.below + fitted.above < 0.75 * (blind.below + blind.above)
    high, low = (verdict(fitted, np.array([s, 0, 0]), SETTINGS).name for s in (3.0, -3.0))
    assert (high, low) == ("reuse", "fallback")


@pytest.mark.parametrize("count", [10, 20, 30, 60])
def test_coverage_over_many_banks_is_what_was_promised(count):
    found = [coverage(*_tasks(count, 0.05, 0.03, seed), SETTINGS, splits=500, seed=seed) for seed in range(60)]
    assert np.mean([c.lower for c in found]) >= 0.895
    assert np.mean([c.upper for c in found]) >= 0.895
    assert np.mean([c.both for c in found]) >= 0.795
    assert {c.splits for c in found} == {500}
    assert np.mean([c.lower for c in found]) < 0.97
    assert all(sum(c.verdicts.values()) == pytest.approx(1) for c in found)


def test_coverage_of_one_bank_agrees_with_trying_each_split_alone():
    gains, statistics = _tasks(24, 0.1, 0.02, 3)
    found = coverage(gains, statistics, SETTINGS, splits=40, seed=5)
    order = np.random.default_rng(5).permuted(np.tile(np.arange(24), (40, 1)), axis=1)
    lower, upper, names = [], [], []
    for split in order:
        calibration = calibrate_gains(gains[split[:12]], statistics[split[:12]], SETTINGS)
        for task in split[12:]:
            one = verdict(calibration, statistics[task], SETTINGS)
            lower.append(gains[task] >= one.lower - 1e-9)
            upper.append(gains[task] <= one.upper + 1e-9)
            names.append(one.name)
    assert found.lower == pytest.approx(np.mean(lower))
    assert found.upper == pytest.approx(np.mean(upper))
    assert found.verdicts["reuse"] == pytest.approx(names.count("reuse") / len(names))


def test_coverage_says_how_many_tasks_it_needs():
    with pytest.raises(InputError, match="at least 10 assessed tasks"):
        coverage(np.zeros(9), np.zeros((9, 3)), SETTINGS)


@given(st.integers(1, 400), st.floats(0.01, 0.4))
def test_fitting_never_takes_tasks_that_calibration_needs(count, alpha):
    fit = tasks_to_fit(count, alpha)
    assert fit == 0 or count - fit >= tasks_needed(alpha)


@pytest.mark.parametrize("change", [{"alpha": 0.0}, {"alpha": 0.5}, {"margin": -0.1}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match="out of range"):
        VerdictSettings(**change)
