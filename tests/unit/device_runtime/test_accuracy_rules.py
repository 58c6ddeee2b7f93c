"""When is a smaller file as good as the float file? The rule, on numbers."""

from __future__ import annotations

import numpy as np
import pytest
from kiridashi_agent.accuracy import chance_of_more, judge_agreement, judge_labelled

LABELS = np.zeros(100, np.int64)
RIGHT = np.zeros(100, np.int64)


def wrong(n: int) -> np.ndarray:
    """Predictions of 100 frames, the first n of them wrong."""
    return np.where(np.arange(100) < n, 1, 0)


@pytest.mark.parametrize(
    ("before", "after", "max_drop", "passed", "part"),
    [
        (RIGHT, wrong(5), 0.05, True, "95.0% of 100 hold-out frames right, float 100.0%; 5.0% may be lost"),
        (RIGHT, wrong(6), 0.05, False, "chance does not explain more (p = 0.016)"),
        (RIGHT, wrong(4), 0.0, True, "chance explains more (p = 0.062)"),
        (RIGHT, wrong(5), 0.0, False, "chance does not explain"),
        (wrong(20), wrong(10), 0.0, True, "90.0% of 100"),
        # As many won as lost: nothing was lost on balance.
        (wrong(10), np.roll(wrong(10), 50), 0.0, True, "90.0% of 100"),
        (RIGHT, wrong(100), 1.0, True, "100.0% may be lost"),
    ],
)
def test_with_labels_more_than_allowed_and_more_than_chance_is_refused(before, after, max_drop, passed, part) -> None:
    check = judge_labelled(LABELS, before, after, "float", max_drop)
    assert (check.passed, check.basis, check.samples, check.allowed) == (passed, "holdout", 100, max_drop)
    assert part in check.reason


@pytest.mark.parametrize(("different", "frames", "passed"), [(0, 8, True), (2, 8, True), (3, 8, False), (8, 8, False)])
def test_without_labels_a_probe_finds_gross_faults(different: int, frames: int, passed: bool) -> None:
    before = np.zeros(frames, np.int64)
    after = np.where(np.arange(frames) < different, 1, 0)
    check = judge_agreement(before, after, "model.onnx", 0.05, "no hold-out")
    assert (check.passed, check.basis, check.drop) == (passed, "probe", different / frames)
    assert f"on {different} of {frames} probe frames (no hold-out)" in check.reason


def test_the_chance_is_the_binomial_tail() -> None:
    assert chance_of_more(0, 8, 0.05) == pytest.approx(1.0)
    assert chance_of_more(8, 8, 0.5) == pytest.approx(1 / 256)
    assert chance_of_more(1, 8, 0.05) == pytest.approx(1 - 0.95**8)
    assert chance_of_more(1, 8, 0.0) == 0.0
    assert chance_of_more(8, 8, 1.0) == 1.0
