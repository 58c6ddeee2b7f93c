"""The closed-form head against slow ways to the same numbers."""

import kiridashi_server.recover.ridge as ridge_module
import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi_server.recover.ridge import fit_ridge_head


def _data(count, width, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 3
    return (np.eye(3, width)[labels] + generator.normal(0, 0.5, (count, width))).astype(np.float32), labels


@pytest.mark.parametrize(("count", "width"), [(12, 30), (40, 5)])
def test_weights_solve_the_ridge_problem_up_to_the_softmax_scale(count, width):
    features, labels = _data(count, width)
    head = fit_ridge_head(features, labels, 3, ridge=0.5)
    X = features - features.mean(0, dtype=np.float64)
    Y = np.eye(3)[labels]
    strength = 0.5 * (X**2).sum(1).mean()
    expected = np.linalg.solve(X.T @ X + strength * np.eye(width), X.T @ (Y - Y.mean(0))).T
    scale = head.weight[0, 0] / expected[0, 0]
    assert 1 <= scale <= 64
    assert head.weight == pytest.approx(scale * expected, rel=1e-4, abs=1e-5)
    assert head.bias == pytest.approx(scale * (Y.mean(0) - expected @ features.mean(0, dtype=np.float64)), abs=1e-4)


@pytest.mark.parametrize(("count", "width"), [(12, 30), (40, 5)])
def test_calibration_sees_what_refitting_without_each_sample_gives(monkeypatch, count, width):
    features, labels = _data(count, width)
    seen = []
    monkeypatch.setattr(ridge_module, "_calibrate", lambda outputs, labels: seen.append(outputs) or 1.0)
    fit_ridge_head(features, labels, 3, ridge=0.5)
    X, Y = features.astype(np.float64), np.eye(3)[labels]
    strength = 0.5 * ((X - X.mean(0)) ** 2).sum(1).mean()
    for i in range(count):
        rest = np.arange(count) != i
        Xc, y_mean = X[rest] - X[rest].mean(0), Y[rest].mean(0)
        weight = np.linalg.solve(Xc.T @ Xc + strength * np.eye(width), Xc.T @ (Y[rest] - y_mean)).T
        assert seen[0][i] == pytest.approx(y_mean + weight @ (X[i] - X[rest].mean(0)), abs=1e-8)


def test_easy_classes_get_a_sharper_softmax_than_hard_ones():
    def confidence(noise):
        generator = np.random.default_rng(0)
        labels = np.arange(60, dtype=np.int64) % 3
        features = (np.eye(3, 8)[labels] + generator.normal(0, noise, (60, 8))).astype(np.float32)
        head = fit_ridge_head(features, labels, 3)
        logits = features @ head.weight.T + head.bias
        return np.ptp(logits, axis=1).mean()

    assert confidence(0.1) > 2 * confidence(2.0)


def test_a_class_without_samples_is_never_preferred():
    features, labels = _data(12, 30)
    head = fit_ridge_head(features, labels, 4)
    logits = features @ head.weight.T + head.bias
    assert (logits.argmax(1) != 3).all()
    assert head.as_linear().weight.shape == (4, 30)


@pytest.mark.parametrize(("count", "ridge"), [(1, 1.0), (12, 0.0)])
def test_too_little_is_refused(count, ridge):
    features, labels = _data(count, 4)
    with pytest.raises(InputError):
        fit_ridge_head(features, labels, 3, ridge)
