"""Leave-one-out LEEP: how well a record's own classes foretell the new task's.

LEEP (Nguyen et al. 2020, arXiv 2002.12462) predicts a target label through the source head: the head gives a
distribution over source classes, and an empirical table ``P(target class | source class)`` turns it into one over
target classes. The table is fitted on the samples it is judged on, so with few samples it flatters, and more so
the more source classes there are. Here each sample is judged by the table of all *other* samples, with a
Dirichlet prior on the target's class shares:

    P_-i(y | z) = (J(y, z) - theta_iz [y = y_i] + a p_y) / (J(z) - theta_iz + a)
    LOO-LEEP    = 1/n  sum_i  log  sum_z  P_-i(y_i | z) theta_iz

with ``J(y, z)`` the sum of ``theta_iz`` over samples of class ``y``, ``J(z)`` its sum over classes, ``p_y`` the class
shares. Its zero point is ``-H(y)``, what is reached by knowing the class shares and nothing else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need

FloatArray = npt.NDArray[np.float64]


def loo_leep(source: FloatArray, labels: npt.NDArray[np.int64], prior: float = 1.0) -> float:
    """The mean log likelihood in nats; at most 0.

    Args:
        source: the source head's probabilities theta, float64 [N, source classes], rows sum to 1.
        labels: target classes, int64 [N].
        prior: Dirichlet strength a, in samples per source class; above 0.
    """
    shares = np.bincount(labels) / len(labels)
    joint = np.eye(len(shares))[labels].T @ source
    others = joint[labels] - source + prior * shares[labels][:, None]
    table = others / (source.sum(axis=0) - source + prior)
    return float(np.log((table * source).sum(axis=1)).mean())


def label_entropy(labels: npt.NDArray[np.int64]) -> float:
    """Entropy of the class shares in nats."""
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


class LooLeep:
    """The measure; needs the record's head, which reads the dense backbone's features."""

    name = "loo-leep"
    needs: tuple[Need, ...] = ("head",)

    def similarity(self, record: Record, target: Descriptor) -> float:
        """LOO-LEEP of the record's head on the target's samples, in nats.

        Raises:
            InputError: the record has no head.
        """
        if record.head_weight is None or record.head_bias is None:
            raise InputError(f"the record of '{record.task}' has no head")
        logits = target.features.astype(np.float64) @ record.head_weight.T.astype(np.float64) + record.head_bias
        logits -= logits.max(axis=1, keepdims=True)
        source = np.exp(logits)
        return loo_leep(source / source.sum(axis=1, keepdims=True), target.labels)

    def zero_point(self, target: Descriptor) -> float | None:
        """What a record without information reaches: minus the entropy of the target's labels."""
        return -label_entropy(target.labels)
