"""What the rest of the SDK needs of an inference runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FloatArray: TypeAlias = "NDArray[np.float32]"
Layout = Literal["NCHW", "NHWC"]
Provider = Literal["tensorrt", "cuda", "xnnpack", "cpu"]
PREFERENCE: tuple[Provider, ...] = ("tensorrt", "cuda", "xnnpack", "cpu")
"""What computes a model, best first. Each runtime takes the first that it has on this machine."""


class LoadedModel(Protocol):
    """A model ready to run. ``run`` may be called from several threads at once.

    Attributes:
        runtime: name and version of the library, for example ``"onnxruntime 1.32.0"``.
        provider: what computes the model, as the library says after loading it.
        layout: the order of the input's axes.
        frame_shape: height and width of the input, pixels; 0 where the model leaves it open.
    """

    runtime: str
    provider: Provider
    layout: Layout
    frame_shape: tuple[int, int]

    def run(self, batch: FloatArray) -> FloatArray:
        """Logits, float32 [N, classes], of a preprocessed batch, float32 [N, 3, H, W] or [N, H, W, 3] as ``layout``.

        Raises:
            BundleError: the model refuses the batch's shape, or fails while running.
        """


class Loader(Protocol):
    """The function ``load`` of a runtime's module."""

    def __call__(self, path: Path, threads: int, providers: Sequence[Provider] = PREFERENCE) -> LoadedModel:
        """Load a model file, computed by the first of ``providers`` that is here and works.

        Raises:
            ImportError: the library is not installed, or cannot work with this Python or numpy.
            RuntimeUnavailableError: none of ``providers`` is here.
            BundleError: the file is not a model that the library can run.
        """
