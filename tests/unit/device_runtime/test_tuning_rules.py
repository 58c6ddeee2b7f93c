"""The pure parts of tuning: closed-form head, the gate, batches, patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kiridashi.errors import BundleError
from kiridashi.manifest import Patch
from kiridashi_agent.closed_form import Head, cross_entropy, fit_head, ridge_head
from kiridashi_agent.gate import chance_of_loss, judge_tuning
from kiridashi_agent.patching import patch_artifact, read_parameters
from kiridashi_agent.steps import balanced_batches, relit


def blobs(count: int, width: int, classes: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(0, 1, (classes, width))
    return (centres[labels] + rng.normal(0, spread, (count, width))).astype(np.float32), labels.astype(np.int64)


@pytest.mark.parametrize("width", [5, 40])
def test_leave_one_out_is_what_refitting_gives(width: int) -> None:
    features, labels = blobs(18, width, 3, 1.0, 1)
    _, left_out = ridge_head(features, labels, 3, 0.1)
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    penalty = 0.1 * (centred**2).sum() / width
    for n in range(len(labels)):
        others = np.arange(len(labels)) != n
        x, y = features[others].astype(np.float64), np.eye(3)[labels[others]]
        fx, fy = x - x.mean(0), y - y.mean(0)
        weight = np.linalg.solve(fx.T @ fx + penalty * np.eye(width), fx.T @ fy)
        expected = y.mean(0) + (features[n] - x.mean(0)) @ weight
        np.testing.assert_allclose(left_out[n], expected, atol=1e-8)


def test_a_wrong_shipped_head_is_replaced_and_generalises() -> None:
    features, labels = blobs(40, 10, 4, 0.5, 2)
    shipped = Head(np.roll(ridge_head(features, labels, 4, 0.01)[0].weight, 1, axis=0), np.zeros(4, np.float32))
    fit = fit_head(features, labels, shipped, 0.01)
    fresh, truth = blobs(200, 10, 4, 0.5, 3)
    assert fit.blend > 0
    assert (shipped.logits(fresh).argmax(1) == truth).mean() < 0.5
    assert (fit.head.logits(fresh).argmax(1) == truth).mean() > 0.9


def test_a_good_shipped_head_survives_useless_samples() -> None:
    many, many_labels = blobs(2000, 10, 4, 0.5, 4)
    raw = ridge_head(many, many_labels, 4, 1e-3)[0]
    shipped = Head(8 * raw.weight, 8 * raw.bias)
    features, labels = blobs(8, 10, 4, 0.5, 5)
    fit = fit_head(features, labels, shipped, 1e3)  # so much ridge that the fit says nothing
    assert fit.accuracy >= fit.shipped_accuracy
    fresh, truth = blobs(200, 10, 4, 0.5, 6)
    assert (fit.head.logits(fresh).argmax(1) == truth).mean() >= (
        shipped.logits(fresh).argmax(1) == truth
    ).mean() - 0.01


def test_separable_samples_do_not_choose_boundless_logits() -> None:
    features, labels = blobs(24, 12, 4, 0.05, 7)
    fit = fit_head(features, labels, Head(np.zeros((4, 12), np.float32), np.zeros(4, np.float32)), 0.01)
    logits = fit.head.logits(features).astype(np.float64)
    assert 1e-4 < cross_entropy(logits, labels, smoothing=0.0) < 0.2


def test_features_without_variance_do_not_break_the_fit() -> None:
    head, left_out = ridge_head(np.ones((6, 4), np.float32), np.array([0, 1, 2] * 2), 3, 0.01)
    assert np.isfinite(head.weight).all()
    assert np.isfinite(left_out).all()


NAMES = ("dent", "ok")


def judged(labels: list[int], before: list[int], after: list[int], drop: float = 0.1) -> tuple[bool, str]:
    arrays = (np.array(values, np.int64) for values in (labels, before, after))
    judgement = judge_tuning(*arrays, NAMES, drop)
    return judgement.kept, judgement.reason


def test_better_is_kept_and_says_by_how_much() -> None:
    kept, reason = judged([0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1])
    assert kept
    assert "75.0% to 100.0%" in reason


@pytest.mark.parametrize(
    ("wrong", "mended", "chance"), [(0, 0, 1.0), (1, 0, 0.5), (4, 0, 0.0625), (5, 0, 0.03125), (3, 3, 0.65625)]
)
def test_chance_is_the_tail_of_a_fair_coin(wrong: int, mended: int, chance: float) -> None:
    assert chance_of_loss(wrong, mended) == pytest.approx(chance)


def test_lower_accuracy_is_not_kept() -> None:
    kept, reason = judged([0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1])
    assert not kept
    assert "fell from 100.0% to 75.0%" in reason


def test_one_class_may_not_pay_for_another() -> None:
    labels, before = [0] * 10 + [1] * 10, [0] * 20

    def after(lost: int) -> list[int]:
        return [1] * lost + [0] * (10 - lost) + [1] * 10

    kept, reason = judged(labels, before, after(5))
    assert not kept
    assert "'dent' lost 5 of its 10 hold-out samples, more than the 10% of the policy" in reason
    assert judged(labels, before, after(4))[0]  # four of ten can still be chance
    assert judged(labels, before, after(5), drop=0.5)[0]


def test_a_large_hold_out_sees_a_loss_that_a_small_one_cannot() -> None:
    def kept(scale: int) -> bool:
        labels, before = [0] * 10 * scale + [1] * 10 * scale, [0] * 20 * scale
        after = [1] * 2 * scale + [0] * 8 * scale + [1] * 10 * scale
        return judged(labels, before, after)[0]

    assert kept(1)
    assert not kept(10)


def test_batches_hold_every_class_equally_often_and_use_every_sample() -> None:
    labels = np.array([0] * 20 + [1] * 3 + [2] * 5)
    batches = list(balanced_batches(labels, 6, 20, np.random.default_rng(0)))
    for chosen in batches:
        assert np.bincount(labels[chosen], minlength=3).tolist() == [2, 2, 2]
    assert set(np.concatenate(batches)) == set(range(28))
    again = balanced_batches(labels, 6, 20, np.random.default_rng(0))
    assert all(np.array_equal(one, two) for one, two in zip(batches, again, strict=True))


def test_relighting_stays_in_range_and_near() -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    lit = relit(images, np.random.default_rng(2))
    difference = np.abs(lit.astype(int) - images.astype(int))
    assert 3 < difference.mean() < 20
    assert difference.max() <= 0.1 * 255 + 12 + 1


def test_patches_write_only_their_places(tmp_path: Path) -> None:
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, 8], np.float32)
    source = tmp_path / "model.bin"
    source.write_bytes(b"head" + weight.T.tobytes() + b"middle" + bias.tobytes() + b"tail")
    patches = (Patch("w", 4, (2, 3), transposed=True), Patch("b", 4 + 24 + 6, (2,)))
    read = read_parameters(source, patches)
    np.testing.assert_array_equal(read["w"], weight)
    np.testing.assert_array_equal(read["b"], bias)
    patch_artifact(source, patches, {"w": (weight * 10).ravel(), "b": bias + 1}, tmp_path / "out" / "model.bin")
    expected = b"head" + (weight * 10).T.tobytes() + b"middle" + (bias + 1).tobytes() + b"tail"
    assert (tmp_path / "out" / "model.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("patch", "value"),
    [
        (Patch("b", 4, (2,)), np.ones(2)),
        (Patch("b", 0, (2,)), np.ones(3)),
        (Patch("b", 0, (2,)), np.array([1.0, np.nan])),
        (Patch("c", 0, (2,)), np.ones(2)),
        (Patch("b", 0, (2,), transposed=True), np.ones(2)),
    ],
)
def test_impossible_patches_write_nothing(tmp_path: Path, patch: Patch, value: np.ndarray) -> None:
    (tmp_path / "m").write_bytes(bytes(8))
    with pytest.raises(BundleError):
        patch_artifact(tmp_path / "m", (patch,), {"b": value.astype(np.float32)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
