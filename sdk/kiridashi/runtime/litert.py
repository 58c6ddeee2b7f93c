"""TFLite models on LiteRT (``ai_edge_litert``), or without it on its predecessor ``tflite_runtime``."""

from __future__ import annotations

import importlib.metadata
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import BundleError
from kiridashi.runtime.protocol import FloatArray, Layout


class LitertModel:
    """An interpreter with its own lock, for an interpreter holds one frame's tensors at a time.

    Frames of a batch run one after the other. A quantised input or output is converted by its own scale and zero
    point, so callers see float32 either way.
    """

    layout: Layout = "NHWC"

    def __init__(self, interpreter: Any, runtime: str) -> None:
        self.runtime = runtime
        self._interpreter = interpreter
        self._input = interpreter.get_input_details()[0]
        self._output = interpreter.get_output_details()[0]
        shape = self._input["shape"]
        self.frame_shape = (int(shape[1]), int(shape[2]))
        self._lock = threading.Lock()

    def run(self, batch: FloatArray) -> FloatArray:
        """See :meth:`LoadedModel.run <kiridashi.runtime.protocol.LoadedModel.run>`."""
        frames = _quantise(batch, self._input)
        with self._lock:
            rows = [self._run_frame(frames[n : n + 1]) for n in range(len(frames))]
        return _dequantise(np.concatenate(rows), self._output)

    def _run_frame(self, frame: NDArray[Any]) -> Any:
        try:
            self._interpreter.set_tensor(self._input["index"], frame)
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise BundleError("LiteRT could not run the model", why=str(error)) from error
        return self._interpreter.get_tensor(self._output["index"])


def load(path: Path, threads: int) -> LitertModel:
    """Load a TFLite file whose input is one image [1, H, W, 3].

    Raises: as :class:`~kiridashi.runtime.protocol.Loader`.
    """
    interpreter_type, runtime = _library()
    try:
        interpreter = interpreter_type(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError, SystemError) as error:
        raise BundleError(f"{runtime} cannot load {path.name}", why=str(error)) from error
    shape = interpreter.get_input_details()[0]["shape"]
    if len(shape) != 4 or shape[0] != 1 or shape[3] != 3:
        raise BundleError(f"{path.name} takes {[int(n) for n in shape]}, not one RGB image [1, H, W, 3]")
    return LitertModel(interpreter, runtime)


def _library() -> tuple[Any, str]:
    """The interpreter class and the library's name and version.

    tflite-runtime 2.14 was built for numpy 1: under numpy 2 it imports and then fails inside ``Interpreter``.

    Raises:
        ImportError: neither library is here, or tflite-runtime meets numpy 2.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    except ModuleNotFoundError:
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            reason = f"tflite-runtime needs numpy below 2, here is {np.__version__}, and ai-edge-litert is not here"
            raise ImportError(reason) from None
        from tflite_runtime.interpreter import Interpreter as Legacy

        return Legacy, f"tflite-runtime {importlib.metadata.version('tflite-runtime')}"


def _quantise(batch: FloatArray, details: dict[str, Any]) -> NDArray[Any]:
    kind = np.dtype(details["dtype"])
    if kind == np.float32:
        return batch
    scale, zero_point = details["quantization"]
    limits = np.iinfo(kind)
    steps: NDArray[Any] = np.clip(np.rint(batch / scale + zero_point), limits.min, limits.max)
    return steps.astype(kind)


def _dequantise(values: NDArray[Any], details: dict[str, Any]) -> FloatArray:
    if values.dtype == np.float32:
        return values
    scale, zero_point = details["quantization"]
    steps: FloatArray = values.astype(np.float32) - np.float32(zero_point)
    return steps * np.float32(scale)
