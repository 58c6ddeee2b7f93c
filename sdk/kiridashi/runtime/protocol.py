"""What the rest of the SDK needs of an inference runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FloatArray: TypeAlias = "NDArray[np.float32]"
Layout = Literal["NCHW", "NHWC"]


class LoadedModel(Protocol):
    """A model ready to run. ``run`` may be called from several threads at once.

    Attributes:
        runtime: name and version of the library, for example ``"onnxruntime 1.32.0"``.
        layout: the order of the input's axes.
        frame_shape: height and width of the input, pixels; 0 where the model leaves it open.
    """

    runtime: str
    layout: Layout
    frame_shape: tuple[int, int]

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits, float32 [N, classes], of a preprocessed batch, float32 [N, 3, H, W] or [N, H, W, 3] as ``layout``.

        Raises:
            BundleError: the model refuses the batch's shape, or fails while running.
        """


class Loader(Protocol):
    """The function ``load`` of a runtime's module."""

    def __call__(self, path: Path, threads: int) -> LoadedModel:
        """Load a model file.

        Raises:
            ImportError: the library is not installed, or cannot work with this Python or numpy.
            BundleError: the file is not a model that the library can run.
        """
