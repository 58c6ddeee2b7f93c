"""ONNX models on stock onnxruntime, CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kiridashi.errors import BundleError
from kiridashi.runtime.protocol import FloatArray, Layout

LOGITS = "logits"
FEATURES = "features"


class OnnxModel:
    """An onnxruntime session; its ``run`` is thread-safe by itself."""

    layout: Layout = "NCHW"

    def __init__(self, session: Any, runtime: str) -> None:
        self.runtime = runtime
        self._session = session
        self._name: str = session.get_inputs()[0].name
        self._outputs: list[str] = [output.name for output in session.get_outputs()]
        self._logits = [LOGITS if LOGITS in self._outputs else self._outputs[0]]
        shape = [extent if isinstance(extent, int) else 0 for extent in session.get_inputs()[0].shape]
        self._batch = shape[0]
        self.frame_shape = (shape[2], shape[3])

    def run(self, batch: FloatArray) -> FloatArray:
        """See :meth:`LoadedModel.run <kiridashi.runtime.protocol.LoadedModel.run>`."""
        return self.run_outputs(batch, self._logits)[0]

    def run_outputs(self, batch: FloatArray, names: Sequence[str]) -> list[FloatArray]:
        """The outputs called ``names`` for a batch, each float32 [N, …].

        Raises:
            BundleError: there is no such output, or onnxruntime refuses.
        """
        missing = set(names) - set(self._outputs)
        if missing:
            raise BundleError(f"the ONNX model has no output {', '.join(sorted(missing))}")
        try:
            if self._batch in (0, len(batch)):
                return list(self._session.run(names, {self._name: batch}))
            size = self._batch
            parts = [batch[start : start + size] for start in range(0, len(batch), size)]
            results = [self._session.run(names, {self._name: part}) for part in parts]
        except refusals() as error:
            raise BundleError("onnxruntime could not run the model", why=_first_line(error)) from error
        return [np.concatenate(column) for column in zip(*results, strict=True)]


def load(path: Path, threads: int) -> OnnxModel:
    """Load an ONNX file whose first input is float32 [N, 3, H, W].

    Raises: as :class:`~kiridashi.runtime.protocol.Loader`.
    """
    import onnxruntime

    session = make_session(path, threads)
    entry = session.get_inputs()[0]
    if entry.type != "tensor(float)" or len(entry.shape) != 4:
        raise BundleError(f"{path.name} takes {entry.type} {entry.shape}, not a batch of float32 images")
    return OnnxModel(session, f"onnxruntime {onnxruntime.__version__}")


def make_session(path: Path, threads: int) -> Any:
    """An ``InferenceSession`` with all graph optimisations, ``threads`` inside an operator and one between them.

    Raises: as :class:`~kiridashi.runtime.protocol.Loader`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except refusals() as error:
        raise BundleError(f"onnxruntime cannot load {path.name}", why=_first_line(error)) from error


def refusals() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a model or an input that it cannot use.

    Its classes share no base but ``Exception``, so they are collected from the module that defines them.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))
    return (*own, RuntimeError, ValueError)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
