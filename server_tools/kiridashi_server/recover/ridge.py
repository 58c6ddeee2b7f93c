"""A linear head in closed form: ridge regression on one-hot labels, scaled to be a calibrated softmax.

With centred features X [N, D] and centred one-hot labels Y [N, C] the weights are ``(X'X + l I)^-1 X'Y``. The
strength ``l`` is relative: a multiple of the features' mean squared distance from their mean. Regression outputs lie
near 0 and 1, which is far too flat for a softmax; they are multiplied by the factor that minimises the cross-entropy
of the *leave-one-out* outputs. These need no second fit: the residual of a left-out sample is its residual divided by
one minus its leverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from kiridashi.errors import InputError
from torch import nn

FloatArray = npt.NDArray[np.float64]

DEFAULT_RIDGE = 1.0
_SCALES = np.geomspace(1.0, 64.0, 49)
_LEAST_FREEDOM = 1e-6


@dataclass(frozen=True, eq=False)
class RidgeHead:
    """A linear head. ``weight`` float32 [classes, D], ``bias`` float32 [classes]."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def as_linear(self) -> nn.Linear:
        """The head as a module, ready to be trained."""
        classes, width = self.weight.shape
        # The usual constructor would draw from torch's global generator.
        head: nn.Linear = nn.utils.skip_init(nn.Linear, width, classes)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.weight))
            head.bias.copy_(torch.from_numpy(self.bias))
        return head


def fit_ridge_head(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], classes: int, ridge: float = DEFAULT_RIDGE
) -> RidgeHead:
    """Fit the head.

    Args:
        features: float32 [N, D], at least two samples.
        labels: int64 [N], below ``classes``.
        classes: number of classes; one without samples gets a low constant logit.
        ridge: relative strength, above 0.

    Raises:
        InputError: fewer than two samples, or a strength that is not above 0.
    """
    _check(features, ridge)
    weight, x_mean, y_mean, left_out = _fit(features, labels, classes, ridge)
    scale = _calibrate(left_out, labels)
    bias = y_mean - weight @ x_mean
    return RidgeHead((scale * weight).astype(np.float32), (scale * bias).astype(np.float32))


def left_out_accuracy(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], classes: int, ridge: float = DEFAULT_RIDGE
) -> float:
    """Accuracy of :func:`fit_ridge_head`'s head, each sample judged by a fit without it. Raises the same errors."""
    _check(features, ridge)
    *_, left_out = _fit(features, labels, classes, ridge)
    return float((left_out.argmax(axis=1) == labels).mean())


def _check(features: npt.NDArray[np.float32], ridge: float) -> None:
    if len(features) < 2 or ridge <= 0:
        raise InputError(
            "a head needs at least two samples and a ridge above 0", why=f"got {len(features)} samples, ridge {ridge}"
        )


def _fit(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], classes: int, ridge: float
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Weights [C, D], means of features [D] and one-hot labels [C], and outputs [N, C] for each sample left out."""
    X = features.astype(np.float64)
    Y = np.eye(classes)[labels]
    x_mean, y_mean = X.mean(axis=0), Y.mean(axis=0)
    Xc, Yc = X - x_mean, Y - y_mean
    strength = ridge * float((Xc**2).sum(axis=1).mean()) + np.finfo(np.float64).tiny
    weight, leverage = _solve(Xc, Yc, strength)
    residual = Yc - Xc @ weight.T
    freedom = np.maximum(1 - leverage - 1 / len(X), _LEAST_FREEDOM)
    left_out = Y - residual / freedom[:, None]
    return weight, x_mean, y_mean, left_out


def _solve(Xc: FloatArray, Yc: FloatArray, strength: float) -> tuple[FloatArray, FloatArray]:
    """Weights [C, D] and leverages [N], through whichever of the two Gram matrices is smaller."""
    count, width = Xc.shape
    if count <= width:
        inverse = np.linalg.inv(Xc @ Xc.T + strength * np.eye(count))
        return (Xc.T @ (inverse @ Yc)).T, 1 - strength * np.diag(inverse)
    inverse = np.linalg.inv(Xc.T @ Xc + strength * np.eye(width))
    return (inverse @ (Xc.T @ Yc)).T, np.einsum("nd,de,ne->n", Xc, inverse, Xc, optimize=True)


def _calibrate(outputs: FloatArray, labels: npt.NDArray[np.int64]) -> float:
    """The factor, from a fixed grid, with the smallest cross-entropy."""
    losses = []
    for scale in _SCALES:
        logits = scale * outputs
        top = logits.max(axis=1, keepdims=True)
        normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        losses.append(float((normaliser - logits[np.arange(len(labels)), labels]).mean()))
    return float(_SCALES[int(np.argmin(losses))])
