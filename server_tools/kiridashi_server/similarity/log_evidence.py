"""LogME: the log evidence of a Bayesian linear model from the masked features to the new task's labels.

For features F [n, D] and one class against the rest, y in {0, 1}^n, the model is ``y = F w + e`` with
``w ~ N(0, I / a)`` and ``e ~ N(0, I / b)``. Its log evidence (You et al. 2021, arXiv 2102.11005) is

    L = D/2 log a + n/2 log b - 1/2 log |a I + b F'F| - b/2 ||F m - y||^2 - a/2 ||m||^2 - n/2 log 2 pi,

``m`` the posterior mean. ``a`` and ``b`` are those that maximise it, found by MacKay's fixed point. With the k
eigenvalues ``g`` of F'F that a thin decomposition gives, ``|a I + b F'F|`` has ``D - k`` further factors ``a``. They
cancel against ``D/2 log a``, so that ``k/2 log a - 1/2 sum log(a + b g)`` is exact for every n and D. With D/2 in its
place, as in published code, the value is off by ``(D - k)/(2n) log a`` for n < D. The measure is the mean of ``L / n``
over the classes.

On the dense features every record would get the same value: the record's own mask is what tells them apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need

FloatArray = npt.NDArray[np.float64]

_ROUNDS = 100
_SETTLED = 1e-6
_TINY = 1e-10  # keeps a and b finite where the features explain the labels fully, or not at all


def log_evidence(features: FloatArray, targets: FloatArray, a: float, b: float) -> float:
    """L above, in nats, not divided by n.

    Args:
        features: F, float64 [n, D].
        targets: y, float64 [n].
        a: precision of the weights, above 0.
        b: precision of the noise, above 0.
    """
    return _evidence(*_spectrum(features, targets[:, None]), a, b, 0)


def logme(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """The mean over classes of the maximal log evidence per sample, in nats.

    Args:
        features: float32 [n, D].
        labels: int64 [n].
    """
    targets = (labels[:, None] == np.unique(labels)).astype(np.float64)
    spectrum = _spectrum(features.astype(np.float64), targets)
    count = len(labels)
    return float(np.mean([_maximal(*spectrum, column) / count for column in range(targets.shape[1])]))


class LogMe:
    """The measure; needs the task's features under the record's mask."""

    name = "logme"
    needs: tuple[Need, ...] = ("masked",)

    def similarity(self, record: Record, target: Descriptor) -> float:
        """Log evidence per sample and class, in nats."""
        return logme(target.masked[record.id], target.labels)

    def zero_point(self, target: Descriptor) -> float | None:
        """None: what features without information reach depends on their number."""
        del target
        return None


def _spectrum(features: FloatArray, targets: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, int]:
    """Eigenvalues g [k] of F'F, squared projections of the targets [k, C], what lies outside of them [C], and n."""
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    inside = (left.T @ targets) ** 2
    outside = np.maximum((targets**2).sum(axis=0) - inside.sum(axis=0), 0.0)
    return singular**2, inside, outside, len(features)


def _maximal(g: FloatArray, inside: FloatArray, outside: FloatArray, count: int, column: int) -> float:
    a = b = 1.0
    for _ in range(_ROUNDS):
        explained, norm, residual = _moments(g, inside[:, column], outside[column], a / b)
        before, a, b = a / b, explained / (norm + _TINY), (count - explained) / (residual + _TINY)
        if abs(a / b - before) <= _SETTLED * before:
            break
    return _evidence(g, inside, outside, count, a, b, column)


def _evidence(
    g: FloatArray, inside: FloatArray, outside: FloatArray, count: int, a: float, b: float, column: int
) -> float:
    _, norm, residual = _moments(g, inside[:, column], outside[column], a / b)
    determinant = len(g) * np.log(a) - np.log(a + b * g).sum()
    return float((determinant + count * np.log(b / (2 * np.pi)) - b * residual - a * norm) / 2)


def _moments(g: FloatArray, inside: FloatArray, outside: float, ratio: float) -> tuple[float, float, float]:
    """Effective number of weights, ``||m||^2`` and ``||F m - y||^2`` for ``a / b = ratio``."""
    shrunk = g + ratio
    explained = float((g / shrunk).sum())
    norm = float((g * inside / shrunk**2).sum())
    return explained, norm, float((inside * (ratio / shrunk) ** 2).sum()) + outside
