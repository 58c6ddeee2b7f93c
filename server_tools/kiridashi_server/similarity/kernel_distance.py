"""Maximum mean discrepancy: the distance of two feature distributions under a Gaussian kernel.

With ``k(x, y) = exp(-||x - y||^2 / (2 h))`` the squared discrepancy is ``E k(x, x') + E k(y, y') - 2 E k(x, y)``
(Gretton et al. 2012, JMLR 13). A record stores moments and no samples, so both sides are taken as Gaussians with
diagonal covariance, for which the expectations have a closed form,

    E k(x, y) = prod_d  sqrt(h / (h + u_d + v_d))  exp(-(p_d - q_d)^2 / (2 (h + u_d + v_d))),

with means p, q and variances u, v. The bandwidth h is the new task's total variance: the same for all records, and
close to half the median squared distance of its samples, the usual choice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need

FloatArray = npt.NDArray[np.float64]


def gaussian_discrepancy(
    first: tuple[FloatArray, FloatArray], second: tuple[FloatArray, FloatArray], h: float
) -> float:
    """The squared discrepancy of two Gaussians, each given as mean and variance [D]; h above 0; in [0, 2]."""
    return _expected(first, first, h) + _expected(second, second, h) - 2 * _expected(first, second, h)


class KernelDistance:
    """The measure; needs the record's stored feature moments and no labels."""

    name = "mmd"
    needs: tuple[Need, ...] = ("moments",)

    def similarity(self, record: Record, target: Descriptor) -> float:
        """Minus the squared discrepancy; at most 0.

        Raises:
            InputError: the record has no feature moments.
        """
        stored_mean, stored_variance = record.moments
        features = target.features.astype(np.float64)
        own = features.mean(axis=0), features.var(axis=0)
        stored = stored_mean.astype(np.float64), stored_variance.astype(np.float64)
        return -gaussian_discrepancy(own, stored, float(own[1].sum()) + float(np.finfo(np.float64).tiny))

    def zero_point(self, target: Descriptor) -> float | None:
        """None: a distance alone does not say when knowing nothing would be better."""
        del target
        return None


def _expected(first: tuple[FloatArray, FloatArray], second: tuple[FloatArray, FloatArray], h: float) -> float:
    width = h + first[1] + second[1]
    return float(np.exp((np.log(h / width) - (first[0] - second[0]) ** 2 / width).sum() / 2))
