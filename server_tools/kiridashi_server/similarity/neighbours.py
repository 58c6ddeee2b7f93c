"""Nearest neighbours under the record's mask: do samples of one class lie together there?

Each sample is classed by the vote of its k nearest *other* samples, Euclidean, among the features of the backbone
masked by the record's scores. The value is the mean over samples of the share of neighbours that are of the sample's
own class: the expected accuracy of a classifier that follows one of them at random, which has fewer ties than the
majority's. Plain neighbours did no worse than more elaborate measures in a comparison of 23 of them (Sorkhei et al.
2025, arXiv 2503.18528).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need

NEIGHBOURS = 3


def neighbour_share(
    features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], neighbours: int = NEIGHBOURS
) -> float:
    """The mean share of a sample's nearest others that are of its class, in [0, 1].

    Args:
        features: float32 [n, D].
        labels: int64 [n].
        neighbours: k; all others where there are fewer. Equally near samples count in their order.
    """
    X = features.astype(np.float64)
    X = X - X.mean(axis=0)
    squares = (X**2).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * X @ X.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : min(neighbours, len(X) - 1)]
    return float((labels[nearest] == labels[:, None]).mean())


class Neighbours:
    """The measure; needs the task's features under the record's mask."""

    name = "knn"
    needs: tuple[Need, ...] = ("masked",)

    def similarity(self, record: Record, target: Descriptor) -> float:
        """The share of neighbours of the same class, in [0, 1]."""
        return neighbour_share(target.masked[record.id], target.labels)

    def zero_point(self, target: Descriptor) -> float | None:
        """What neighbours at random reach: the chance that another sample is of the same class."""
        counts, total = np.bincount(target.labels), len(target.labels)
        return float((counts * (counts - 1)).sum() / (total * (total - 1)))
