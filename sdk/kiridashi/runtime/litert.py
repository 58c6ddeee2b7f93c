"""TFLite models on LiteRT (``ai_edge_litert``), or without it on its predecessor ``tflite_runtime``."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import BundleError, RuntimeUnavailableError
from kiridashi.runtime.protocol import PREFERENCE, FloatArray, Layout, Provider

_LEGACY = "tflite-runtime"


class LitertModel:
    """An interpreter with its own lock, for an interpreter holds one frame's tensors at a time.

    Frames of a batch run one after the other. A quantised input or output is converted by its own scale and zero
    point, so callers see float32 either way.
    """

    layout: Layout = "NHWC"

    def __init__(self, interpreter: Any, runtime: str, provider: Provider) -> None:
        self.runtime = runtime
        self.provider = provider
        self._interpreter = interpreter
        self._input = interpreter.get_input_details()[0]
        self._output = interpreter.get_output_details()[0]
        self._places: tuple[int, int] = (self._input["index"], self._output["index"])
        self._floats = all(np.dtype(end["dtype"]) == np.float32 for end in (self._input, self._output))
        shape = self._input["shape"]
        self.frame_shape = (int(shape[1]), int(shape[2]))
        self._lock = threading.Lock()

    def run(self, batch: FloatArray) -> FloatArray:
        """See :meth:`LoadedModel.run <kiridashi.runtime.protocol.LoadedModel.run>`."""
        if self._floats:
            rows: FloatArray = self._run(batch)
            return rows
        return _dequantise(self._run(_quantise(batch, self._input)), self._output)

    def _run(self, frames: NDArray[Any]) -> Any:
        with self._lock:
            if len(frames) == 1:
                return self._run_frame(frames)
            return np.concatenate([self._run_frame(frames[n : n + 1]) for n in range(len(frames))])

    def _run_frame(self, frame: NDArray[Any]) -> Any:
        source, result = self._places
        try:
            self._interpreter.set_tensor(source, frame)
            self._interpreter.invoke()
            return self._interpreter.get_tensor(result)
        except (RuntimeError, ValueError) as error:
            raise BundleError("LiteRT could not run the model", why=str(error)) from error


def load(path: Path, threads: int, providers: Sequence[Provider] = PREFERENCE) -> LitertModel:
    """Load a TFLite file whose input is one image [1, H, W, 3].

    Raises: as :func:`new_interpreter` and :func:`allocate`.
    """
    interpreter, runtime, wanted = new_interpreter(path, threads, providers)
    provider = allocate(interpreter, runtime, wanted, path)
    shape = interpreter.get_input_details()[0]["shape"]
    if len(shape) != 4 or shape[0] != 1 or shape[3] != 3:
        raise BundleError(f"{path.name} takes {[int(n) for n in shape]}, not one RGB image [1, H, W, 3]")
    return LitertModel(interpreter, runtime, provider)


def new_interpreter(path: Path, threads: int, providers: Sequence[Provider]) -> tuple[Any, str, tuple[Provider, ...]]:
    """A TFLite file's interpreter, the library's name and version, and those of ``providers`` that it has.

    They are "xnnpack", and "cpu" for the library's own kernels without it.

    Raises: as :class:`~kiridashi.runtime.protocol.Loader`.
    """
    library, runtime = _library()
    wanted = tuple(name for name in providers if name in ("xnnpack", "cpu"))
    if not wanted:
        raise RuntimeUnavailableError(
            f"{runtime} has none of the providers {', '.join(providers)}",
            why="it has xnnpack and cpu",
            next_step="leave the provider open, or use an ONNX file",
        )
    kernels = library.OpResolverType
    resolver = kernels.AUTO if wanted[0] == "xnnpack" else kernels.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = library.Interpreter(
            model_path=str(path), num_threads=threads, experimental_op_resolver_type=resolver
        )
    except (RuntimeError, ValueError, SystemError) as error:
        raise BundleError(f"{runtime} cannot load {path.name}", why=str(error)) from error
    return interpreter, runtime, wanted


def allocate(interpreter: Any, runtime: str, wanted: Sequence[Provider], path: Path) -> Provider:
    """Give the interpreter its tensors; returns what computes the model.

    Raises:
        BundleError: the library cannot run the file. tflite-runtime is refused a dynamically quantised one, which it
            runs without complaint and with wrong results.
        RuntimeUnavailableError: XNNPACK cannot take the model, and nothing else is wanted.
    """
    try:
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError, SystemError) as error:
        raise BundleError(f"{runtime} cannot load {path.name}", why=str(error)) from error
    operators = interpreter._get_ops_details()
    if runtime.startswith(_LEGACY) and is_dynamic(operators, interpreter.get_tensor_details()):
        raise BundleError(
            f"{path.name} is quantised dynamically, which {runtime} computes wrongly and without an error",
            why="it reads float activations and int8 weights in one operator",
            next_step="pip install 'kiridashi[litert]', or use a static int8 or float file",
        )
    delegated = any(operator["op_name"] == "DELEGATE" for operator in operators)
    if not delegated and "cpu" not in wanted:
        raise RuntimeUnavailableError(f"{runtime} could not give {path.name} to XNNPACK", next_step="allow cpu too")
    return "xnnpack" if delegated else "cpu"


def is_dynamic(operators: Sequence[dict[str, Any]], tensors: Sequence[dict[str, Any]]) -> bool:
    """Whether an operator takes float32 and int8 together: activations are then quantised while it runs."""
    kinds = {int(tensor["index"]): np.dtype(tensor["dtype"]) for tensor in tensors}
    mixed = {np.dtype(np.float32), np.dtype(np.int8)}
    taken = ({kinds.get(int(n)) for n in op["inputs"]} for op in operators if op["op_name"] != "DELEGATE")
    return any(mixed <= kinds_taken for kinds_taken in taken)


def _library() -> tuple[Any, str]:
    """The library's interpreter module, and its name and version.

    tflite-runtime 2.14 was built for numpy 1: under numpy 2 it imports and then fails inside ``Interpreter``.

    Raises:
        ImportError: neither library is here, or tflite-runtime meets numpy 2.
    """
    try:
        from ai_edge_litert import interpreter

        return interpreter, f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    except ModuleNotFoundError:
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            reason = f"tflite-runtime needs numpy below 2, here is {np.__version__}, and ai-edge-litert is not here"
            raise ImportError(reason) from None
        from tflite_runtime import interpreter as legacy

        return legacy, f"{_LEGACY} {importlib.metadata.version(_LEGACY)}"


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
