"""What is known of a new task when it is compared with records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kiridashi_server.amp.scores import ScoreMap

Need: TypeAlias = Literal["head", "moments", "taylor", "masked"]
"""What a measure asks for: of the record its head, its feature moments or its first-order scores; of the task, beside
dense features and labels, first-order scores or features under the record's mask."""


@dataclass(frozen=True, eq=False)
class Descriptor:
    """A task's few samples, as the dense backbone sees them, and as far as a measure needs it, as its masks do.

    Attributes:
        features: pooled features of the uncut backbone, float32 [N, D].
        labels: int64 [N].
        masked: by record id, features of the backbone masked by the record's scores, float32 [N, D].
        taylor: first-order scores on the few samples by group, float32 [size].
    """

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    masked: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    taylor: ScoreMap = field(default_factory=dict)
