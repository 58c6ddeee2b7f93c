"""A linear head in closed form: ridge regression on features, chosen by leave-one-out. Pure numpy.

With centred features F (n x D), one-hot targets Y and the penalty ``λ = ridge · n · (mean feature variance)``, the
weights are ``(FᵀF + λI)⁻¹ FᵀY`` with a free intercept. Ridge regression is a linear smoother with the hat matrix
``H = 11ᵀ/n + F(FᵀF + λI)⁻¹Fᵀ``, so the prediction for sample i from all others follows without refitting:
``ŷ₋ᵢ = yᵢ - (yᵢ - ŷᵢ) / (1 - Hᵢᵢ)`` (the PRESS identity; Hastie, Tibshirani and Friedman, *The Elements of
Statistical Learning*, 7.10).

Regression outputs lie near 0 and 1, too flat for a softmax, and the shipped head knows things that few samples do not
show. So the head used is ``(1 - a) · shipped + a · s · ridge``, with a and s from a small grid, by the lowest
cross-entropy of the leave-one-out predictions among those that are right as often as the shipped head. The targets
of that cross-entropy are smoothed (a tenth spread over all classes): few samples are often separable, and then the
largest s would always win, with probabilities near 1 and no gradient left for the iterations. The hold-out has no part
in any of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kiridashi.runtime.protocol import FloatArray
from numpy.typing import NDArray

BLENDS = (0.25, 0.5, 0.75, 1.0)
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
SMOOTHING = 0.1
_LEAST_RESIDUAL_SHARE = 1e-6
_LEAST_PENALTY = 1e-12
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """``logits = features · weightᵀ + bias``; weight float32 [classes, D], bias float32 [classes]."""

    weight: FloatArray
    bias: FloatArray

    def logits(self, features: FloatArray) -> FloatArray:
        """float32 [n, classes] for features [n, D]."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class HeadFit:
    """The chosen head. ``blend`` is a above (0: the shipped head was best), ``scale`` is s.

    ``accuracy`` and ``shipped_accuracy`` are shares of the training samples, ``accuracy`` leave-one-out.
    """

    head: Head
    blend: float
    scale: float
    accuracy: float
    shipped_accuracy: float


def fit_head(features: FloatArray, labels: NDArray[np.int64], shipped: Head, ridge: float) -> HeadFit:
    """Fit and choose a head on the training samples.

    Args:
        features: float32 [n, D], n >= 2.
        labels: int64 [n], classes of the shipped head.
        shipped: the head that the bundle came with.
        ridge: the penalty, relative to n times the mean feature variance.
    """
    fitted, left_out = ridge_head(features, labels, len(shipped.bias), ridge)
    base = shipped.logits(features).astype(np.float64)
    shipped_accuracy = _accuracy(base, labels)
    best = (cross_entropy(base, labels), 0.0, 1.0, shipped_accuracy)
    for blend in BLENDS:
        for scale in SCALES:
            logits = (1 - blend) * base + blend * scale * left_out
            accuracy = _accuracy(logits, labels)
            if accuracy >= shipped_accuracy:
                best = min(best, (cross_entropy(logits, labels), blend, scale, accuracy))
    _, blend, scale, accuracy = best
    mixed = Head(_mix(shipped.weight, fitted.weight, blend, scale), _mix(shipped.bias, fitted.bias, blend, scale))
    return HeadFit(mixed, blend, scale, accuracy, shipped_accuracy)


def ridge_head(features: FloatArray, labels: NDArray[np.int64], classes: int, ridge: float) -> tuple[Head, Float64]:
    """The ridge head, and its leave-one-out outputs float64 [n, classes]. Arguments as :func:`fit_head`."""
    targets = np.eye(classes)[labels]
    centre, level = features.mean(axis=0, dtype=np.float64), targets.mean(axis=0)
    u, s, vt = np.linalg.svd(features - centre, full_matrices=False)
    penalty = max(ridge * float((s**2).sum()) / features.shape[1], _LEAST_PENALTY)
    along = u.T @ (targets - level)
    shrink = s**2 / (s**2 + penalty)
    outputs = level + u @ (shrink[:, None] * along)
    leverage = 1 / len(labels) + (u**2 * shrink).sum(axis=1)
    residual_share = np.maximum(1 - leverage, _LEAST_RESIDUAL_SHARE)[:, None]
    left_out = targets - (targets - outputs) / residual_share
    weight = (vt.T @ ((s / (s**2 + penalty))[:, None] * along)).T
    bias = level - weight @ centre
    return Head(weight.astype(np.float32), bias.astype(np.float32)), left_out


def cross_entropy(logits: Float64, labels: NDArray[np.int64], smoothing: float = SMOOTHING) -> float:
    """Mean cross-entropy of softmax(logits) [n, classes] against one-hot targets smoothed by ``smoothing``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    of_label = log_p[np.arange(len(labels)), labels]
    return float(-((1 - smoothing) * of_label + smoothing * log_p.mean(axis=1)).mean())


def _accuracy(logits: Float64, labels: NDArray[np.int64]) -> float:
    return float((logits.argmax(axis=1) == labels).mean())


def _mix(shipped: FloatArray, fitted: FloatArray, blend: float, scale: float) -> FloatArray:
    mixed: FloatArray = (1 - blend) * shipped + blend * scale * fitted
    return mixed.astype(np.float32)
