"""What a model says of a frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import InputError
from kiridashi.runtime.protocol import FloatArray


@dataclass(frozen=True, eq=False, slots=True)
class Prediction:
    """What a model says of one frame or of a batch.

    Attributes:
        values: probabilities, float32 [classes] for one frame, [N, classes] for a batch.
        labels: the class names, in the order of ``values``.
        model_digest: the model that predicted; a locally tuned model has a digest of its own.
        version: the version of the line's bundle that it belongs to.
    """

    values: FloatArray
    labels: tuple[str, ...]
    model_digest: str
    version: int

    @property
    def index(self) -> int:
        """The best class of one frame.

        Raises:
            InputError: this is a batch; use ``indices``.
        """
        if self.values.ndim != 1:
            raise InputError(f"this prediction is of {len(self.values)} frames", next_step="use .indices")
        return int(self.values.argmax())

    @property
    def label(self) -> str:
        """The name of the best class of one frame. Raises as ``index``."""
        return self.labels[self.index]

    @property
    def confidence(self) -> float:
        """The probability of the best class of one frame. Raises as ``index``."""
        return float(self.values[self.index])

    @property
    def indices(self) -> NDArray[np.int64]:
        """The best class of every frame, int64 [N]; [1] for one frame."""
        best: NDArray[np.int64] = np.atleast_2d(self.values).argmax(axis=1)
        return best
