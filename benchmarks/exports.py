"""Cut programs in the runtimes of devices: exported, loaded, and compared with torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from kiridashi_server.graph import Plan, capture, cut, track
from torch import Tensor, fx

from benchmarks.zoo import ZOO

TOLERANCE = 1e-3
"""Largest difference between a runtime and torch, both float32, as a share of the largest output."""

_TIMEOUT_S = 400.0


def small_program(name: str, seed: int, *, dynamic_batch: bool) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The model of that name in float32 with half of every group cut, and an input for it."""
    entry = ZOO[name]
    inputs = tuple(_single(value) for value in entry.inputs(1, seed))
    program = capture(entry.build(seed).float(), inputs, dynamic_batch=dynamic_batch)
    tracking = track(program)
    halves = {group.name: range(max(1, group.size // 2)) for group in tracking.layout.groups}
    return cut(program, tracking, Plan.of(tracking.layout, halves)), inputs


def onnx_difference(small: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Export to ONNX, run in onnxruntime, and give the largest difference as a share of the largest output."""
    import onnxruntime

    program = torch.onnx.export(small, inputs, dynamo=True, verbose=False, optimize=True)
    if program is None:
        raise RuntimeError("the ONNX exporter returned no model")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.onnx")
        program.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        results = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    return _difference(small, inputs, results)


def tflite_difference(small: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """The same for TFLite and LiteRT."""
    import litert_torch

    results = litert_torch.convert(small, inputs)(*inputs)
    return _difference(small, inputs, list(results) if isinstance(results, tuple | list) else [results])


def here(kind: str, name: str, seed: int, dynamic_batch: bool) -> tuple[float | None, str]:
    """Export to ``kind``, "onnx" or "tflite", in this process.

    Returns:
        The difference and an empty text, or None and what went wrong.
    """
    try:
        small, inputs = small_program(name, seed, dynamic_batch=dynamic_batch)
        return _EXPORTERS[kind](small, inputs), ""
    except Exception as error:  # noqa: BLE001 - exporters raise errors of many unrelated classes
        return None, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def apart(kind: str, name: str, seed: int, dynamic_batch: bool) -> tuple[float | None, str]:
    """The same in a process of its own, so that a crash or endless work of the exporter is one model's result."""
    context = multiprocessing.get_context("spawn")
    results, sent = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sent, kind, name, seed, dynamic_batch))
    process.start()
    sent.close()
    try:
        if not results.poll(_TIMEOUT_S):
            return None, f"took longer than {_TIMEOUT_S:.0f} s"
        received: tuple[float | None, str] = results.recv()
    except EOFError:
        process.join()
        return None, f"the exporter's process ended with code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return received


_EXPORTERS: dict[str, Callable[[fx.GraphModule, tuple[Tensor, ...]], float]] = {
    "onnx": onnx_difference,
    "tflite": tflite_difference,
}


def _send(results: Connection, kind: str, name: str, seed: int, dynamic_batch: bool) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("wb") as nowhere:  # exporters talk, also from native code
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    results.send(here(kind, name, seed, dynamic_batch))


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _difference(small: fx.GraphModule, inputs: tuple[Tensor, ...], results: list[np.ndarray]) -> float:
    with torch.no_grad():
        outputs = small(*inputs)
    expected = [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]
    if [value.shape for value in expected] != [np.shape(value) for value in results]:
        raise ValueError(f"{len(results)} outputs, or other shapes than torch's {len(expected)}")
    pairs = zip(expected, results, strict=True)
    return max(float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-12)) for one, other in pairs)
