"""Fréchet distance of feature moments: do the two tasks look alike, whatever their labels are?

For two Gaussians with diagonal covariance (the only ones that a few dozen samples can support) the squared
Fréchet distance is ``sum (m1 - m2)^2 + (s1 - s2)^2`` over the features. It is divided by the record's total
variance, so that it has no unit, and negated, so that larger means more similar.
"""

from __future__ import annotations

import numpy as np

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need


class Frechet:
    """The measure; needs the record's stored feature moments and no labels."""

    name = "frechet"
    needs: tuple[Need, ...] = ("moments",)

    def similarity(self, record: Record, target: Descriptor) -> float:
        """Minus the relative squared distance; at most 0.

        Raises:
            InputError: the record has no feature moments.
        """
        stored_mean, stored_variance = record.moments
        features = target.features.astype(np.float64)
        mean_gap = features.mean(axis=0) - stored_mean
        spread_gap = features.std(axis=0) - np.sqrt(stored_variance)
        total = float(stored_variance.sum(dtype=np.float64)) + float(np.finfo(np.float64).tiny)
        return -float((mean_gap**2 + spread_gap**2).sum()) / total

    def zero_point(self, target: Descriptor) -> float | None:
        """None: a distance alone does not say when knowing nothing would be better."""
        del target
        return None
