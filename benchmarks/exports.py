"""Cut programs in the runtimes of devices: exported, loaded, and compared with torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from kiridashi_server.export.onnx import contiguous_attention
from kiridashi_server.graph import Plan, capture, cut, track
from torch import Tensor, fx, nn

from benchmarks.zoo import ZOO

TOLERANCE = 1e-3
"""Largest difference between a runtime and torch, both float32, as a share of the largest output."""

_TIMEOUT_S = 600.0
_INPUTS = 8

Run: TypeAlias = Callable[[tuple[Tensor, ...]], list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one export.

    Attributes:
        difference: between the runtime and torch for the cut program, as a share of the largest output.
        error: what went wrong instead.
        uncut: the same difference for the whole program, where the cut one failed or disagreed.
        uncut_error: what went wrong there.
        unsure_inputs: how many inputs were passed over because torch itself is unsure of them.
    """

    difference: float | None = None
    error: str = ""
    uncut: float | None = None
    uncut_error: str = ""
    unsure_inputs: int = 0


def here(kind: str, name: str, seed: int, dynamic_batch: bool) -> Outcome:
    """Export half of every group cut to ``kind``, "onnx" or "tflite", in this process; if that fails, all uncut too."""
    outcome = _tried(kind, name, seed, dynamic_batch, whole=False)
    if outcome.difference is not None and outcome.difference <= TOLERANCE:
        return outcome
    uncut = _tried(kind, name, seed, dynamic_batch, whole=True)
    return replace(outcome, uncut=uncut.difference, uncut_error=uncut.error)


def _tried(kind: str, name: str, seed: int, dynamic_batch: bool, *, whole: bool) -> Outcome:
    entry = ZOO[name]
    try:
        model = entry.build(seed).float()
        program, inputs = prepared(model, entry.inputs(1, seed), dynamic_batch=dynamic_batch, whole=whole)
        run = _EXPORTERS[kind](program, inputs)
        difference = largest_difference(_outputs(program, inputs), run(inputs))
        unsure = 0
        if difference > TOLERANCE:
            precise, _ = prepared(model.double(), entry.inputs(1, seed), dynamic_batch=dynamic_batch, whole=whole)
            batches = [_as(entry.inputs(1, seed + number), torch.float32) for number in range(_INPUTS)]
            difference, unsure = _where_torch_is_sure(program, precise, run, batches)
        return Outcome(difference, unsure_inputs=unsure)
    except Exception as error:  # noqa: BLE001 - exporters raise errors of many unrelated classes
        return Outcome(error=f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")


def prepared(
    model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic_batch: bool, whole: bool
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The program of ``model`` with half of every group cut, or ``whole``, and the inputs in the model's type."""
    inputs = _as(inputs, next(model.parameters()).dtype)
    program = capture(model, inputs, dynamic_batch=dynamic_batch)
    if whole:
        return program, inputs
    tracking = track(program)
    halves = {group.name: range(max(1, group.size // 2)) for group in tracking.layout.groups}
    return cut(program, tracking, Plan.of(tracking.layout, halves)), inputs


def _where_torch_is_sure(
    program: fx.GraphModule, precise: fx.GraphModule, run: Run, batches: list[tuple[Tensor, ...]]
) -> tuple[float, int]:
    """The runtime's difference for the first batch of which torch is sure, and how many were passed over before it.

    Detectors with random weights give candidates scores closer than float32 can tell, or equal ones; which of them
    is taken is then chance. Torch is unsure of a batch if ``program`` and ``precise``, the same in float64, differ
    as much as nobody may. A batch on which the runtime agrees with one of them counts all the same.
    """
    for number, batch in enumerate(batches):
        single, double = _outputs(program, batch), _outputs(precise, _as(batch, torch.float64))
        difference = min(largest_difference(expected, run(batch)) for expected in (single, double))
        if difference <= TOLERANCE or largest_difference(double, single) <= TOLERANCE:
            return difference, number
    raise RuntimeError(f"torch gives other results in float32 than in float64 for {len(batches)} inputs")


def _export_onnx(program: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Run:
    import onnxruntime

    captured = contiguous_attention(torch.export.export(program, inputs))
    exported = torch.onnx.export(captured, dynamo=True, verbose=False, optimize=True)
    if exported is None:
        raise RuntimeError("the ONNX exporter returned no model")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.onnx")
        exported.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(None, dict(zip(names, (value.numpy() for value in batch), strict=True)))


def _export_tflite(program: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Run:
    import litert_torch

    converted = litert_torch.convert(program, inputs)

    def run(batch: tuple[Tensor, ...]) -> list[np.ndarray]:
        results = converted(*batch)
        return list(results) if isinstance(results, tuple | list) else [results]

    return run


def apart(kind: str, name: str, seed: int, dynamic_batch: bool) -> Outcome:
    """:func:`here` in a process of its own, so that a crash or endless work of the exporter is one model's result."""
    context = multiprocessing.get_context("spawn")
    results, sent = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sent, kind, name, seed, dynamic_batch))
    process.start()
    sent.close()
    try:
        if not results.poll(_TIMEOUT_S):
            return Outcome(error=f"took longer than {_TIMEOUT_S:.0f} s")
        received: Outcome = results.recv()
    except EOFError:
        process.join()
        return Outcome(error=f"the exporter's process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
    return received


_EXPORTERS: dict[str, Callable[[fx.GraphModule, tuple[Tensor, ...]], Run]] = {
    "onnx": _export_onnx,
    "tflite": _export_tflite,
}


def _send(results: Connection, kind: str, name: str, seed: int, dynamic_batch: bool) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("wb") as nowhere:  # exporters talk, also from native code
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    results.send(here(kind, name, seed, dynamic_batch))


def _as(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


def _outputs(program: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        outputs = program(*inputs)
    return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]


def largest_difference(expected: list[np.ndarray], results: list[np.ndarray]) -> float:
    """The largest difference as a share of the largest value of its output; shapes that differ are an error."""
    if [value.shape for value in expected] != [np.shape(value) for value in results]:
        raise ValueError(f"{len(results)} outputs, or other shapes than torch's {len(expected)}")
    pairs = zip(expected, results, strict=True)
    return max(float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-12)) for one, other in pairs)
