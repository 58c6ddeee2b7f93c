"""ONNX models on onnxruntime: TensorRT, CUDA or CPU, whichever is here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kiridashi.errors import BundleError, RuntimeUnavailableError
from kiridashi.runtime.protocol import PREFERENCE, FloatArray, Layout, Provider

LOGITS = "logits"
FEATURES = "features"
_NAMES: dict[Provider, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
# TF32 rounds the mantissa to 10 bits by default, and the probe would find that the outputs are not the known ones.
_OPTIONS: dict[Provider, dict[str, str]] = {"cuda": {"use_tf32": "0"}}


class OnnxModel:
    """An onnxruntime session; its ``run`` is thread-safe by itself."""

    layout: Layout = "NCHW"

    def __init__(self, session: Any, runtime: str) -> None:
        self.runtime = runtime
        self.provider = provider_of(session)
        self._session = session
        self._name: str = session.get_inputs()[0].name
        self._outputs: list[str] = [output.name for output in session.get_outputs()]
        self._logits = [LOGITS if LOGITS in self._outputs else self._outputs[0]]
        shape = [extent if isinstance(extent, int) else 0 for extent in session.get_inputs()[0].shape]
        self._batch = shape[0]
        self.frame_shape = (shape[2], shape[3])

    def run(self, batch: FloatArray) -> FloatArray:
        """See :meth:`LoadedModel.run <kiridashi.runtime.protocol.LoadedModel.run>`."""
        return self._run(batch, self._logits)[0]

    def run_outputs(self, batch: FloatArray, names: Sequence[str]) -> list[FloatArray]:
        """The outputs called ``names`` for a batch, each float32 [N, …].

        Raises:
            BundleError: there is no such output, or onnxruntime refuses.
        """
        missing = set(names) - set(self._outputs)
        if missing:
            raise BundleError(f"the ONNX model has no output {', '.join(sorted(missing))}")
        return self._run(batch, names)

    def _run(self, batch: FloatArray, names: Sequence[str]) -> list[FloatArray]:
        size = self._batch
        try:
            if size in (0, len(batch)):
                return list(self._session.run(names, {self._name: batch}))
            pieces = [_filled(batch[start : start + size], size) for start in range(0, len(batch), size)]
            results = [self._session.run(names, {self._name: piece}) for piece in pieces]
        except refusals() as error:
            raise BundleError("onnxruntime could not run the model", why=first_line(error)) from error
        return [np.concatenate(column)[: len(batch)] for column in zip(*results, strict=True)]


def load(path: Path, threads: int, providers: Sequence[Provider] = PREFERENCE, data: bytes | None = None) -> OnnxModel:
    """Load an ONNX file whose first input is float32 [N, 3, H, W]; a fixed N is met by splitting and filling up.

    ``data`` is its content, if that is to be another than the file's.

    Raises: as :class:`~kiridashi.runtime.protocol.Loader`.
    """
    import onnxruntime

    session = make_session(path, threads, choose(providers, onnxruntime.get_available_providers()), data=data)
    entry = session.get_inputs()[0]
    if entry.type != "tensor(float)" or len(entry.shape) != 4:
        raise BundleError(f"{path.name} takes {entry.type} {entry.shape}, not a batch of float32 images")
    return OnnxModel(session, f"onnxruntime {onnxruntime.__version__}")


def choose(wanted: Sequence[Provider], available: Sequence[str]) -> tuple[Provider, ...]:
    """Those of ``wanted`` that onnxruntime lists as ``available``, in the order of ``wanted``.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    chosen = tuple(name for name in wanted if _NAMES.get(name) in available)
    if not chosen:
        here = [name for name, full in _NAMES.items() if full in available]
        raise RuntimeUnavailableError(
            f"onnxruntime has none of the providers {', '.join(wanted)} on this machine",
            why=f"it has {', '.join(here)}",
            next_step="leave the provider open, or install the onnxruntime of your GPU",
        )
    return chosen


def provider_of(session: Any) -> Provider:
    """What the session really uses first: onnxruntime passes over a GPU whose libraries do not load."""
    used: list[str] = session.get_providers()
    return next(name for name, full in _NAMES.items() if full == used[0])


def make_session(
    path: Path,
    threads: int,
    providers: Sequence[Provider] = ("cpu",),
    *,
    memory_pattern: bool = True,
    data: bytes | None = None,
) -> Any:
    """An ``InferenceSession`` with all graph optimisations, ``threads`` inside an operator and one between them.

    Without ``memory_pattern`` the runtime does not lay out all values of a run in one block, which it would hold beside
    what the first run had taken: a quarter less memory for a train step, at the same speed. ``data`` is the file's
    content, if that is to be another.

    Raises:
        ImportError: onnxruntime is not here.
        RuntimeUnavailableError: every provider but the CPU failed, and the CPU was not asked for.
        BundleError: onnxruntime cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = memory_pattern
    listed = [(_NAMES[name], _OPTIONS.get(name, {})) for name in providers]
    try:
        session = onnxruntime.InferenceSession(str(path) if data is None else data, options, providers=listed)
    except refusals() as error:
        raise BundleError(f"onnxruntime cannot load {path.name}", why=first_line(error)) from error
    if provider_of(session) not in providers:
        raise RuntimeUnavailableError(
            f"onnxruntime could not start {', '.join(providers)}",
            why="its libraries are missing or do not fit the driver; onnxruntime's log on standard error says which",
        )
    return session


def _filled(piece: FloatArray, size: int) -> FloatArray:
    """The piece as a batch of ``size``: the last frame stands in for those that are missing."""
    lacking = size - len(piece)
    return np.concatenate([piece, np.repeat(piece[-1:], lacking, axis=0)]) if lacking else piece


def refusals() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a model or an input that it cannot use.

    Its classes share no base but ``Exception``, so they are collected from the module that defines them.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))
    return (*own, RuntimeError, ValueError)


def first_line(error: Exception) -> str:
    """What onnxruntime says, without the lines that name places in its own code."""
    return str(error).strip().partition("\n")[0]
