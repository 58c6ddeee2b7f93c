"""What is known of a new task when it is compared with records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Descriptor:
    """A task's few samples, as the dense backbone sees them.

    Attributes:
        features: pooled features of the uncut backbone, float32 [N, D].
        labels: int64 [N].
    """

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
