"""What ``LineModel.predict`` costs over the bare runtime: paired, interleaved, preprocessing taken out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from kiridashi import LineModel
from kiridashi.manifest import Manifest
from kiridashi.preprocess import model_input
from kiridashi.runtime.onnx import LOGITS, make_session
from kiridashi.slots import Active, LineSlots

FloatArray = npt.NDArray[np.float64]
Bare = Callable[[npt.NDArray[np.float32]], Any]
_WARM_UP = 50


def overhead_us(
    slots: LineSlots, manifest: Manifest, artifact: str, pairs: int, rng: np.random.Generator
) -> FloatArray:
    """Differences in microseconds, float64 [pairs]: a prediction, less its preprocessing, less the bare call.

    The bare call is that of the library's own documentation, in a session of its own over the same file, on the
    preprocessed frame. The three are timed one after the other in random order, one pair after another.
    """
    slots.activate(Active(slot="a", artifact=artifact, model_digest=manifest.digest))
    spec = manifest.preprocessing
    frame = rng.integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)
    with LineModel.open(slots.line, slots.root.parent.parent) as model:
        layout = model.info().layout
        ready = model_input(frame, spec, layout)
        bare = bare_call(slots.folder("a") / artifact)
        parts: tuple[Callable[[], Any], ...] = (
            lambda: model.predict(frame),
            lambda: model_input(frame, spec, layout),
            lambda: bare(ready),
        )
        for _ in range(_WARM_UP):
            for part in parts:
                part()
        times = np.empty((pairs, len(parts)))
        orders = rng.permuted(np.tile(np.arange(len(parts)), (pairs, 1)), axis=1)
        gc.disable()
        try:
            for row, order in zip(times, orders.tolist(), strict=True):
                for n in order:
                    part = parts[n]
                    before = time.perf_counter_ns()
                    part()
                    row[n] = (time.perf_counter_ns() - before) / 1e3
        finally:
            gc.enable()
    return times[:, 0] - times[:, 1] - times[:, 2]


def bare_call(path: Path) -> Bare:
    """The library's own call for one preprocessed frame, on one thread."""
    if path.suffix == ".onnx":
        session = make_session(path, 1)
        names = [output.name for output in session.get_outputs()]
        wanted, name = [LOGITS if LOGITS in names else names[0]], session.get_inputs()[0].name
        return lambda frame: session.run(wanted, {name: frame})
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    source, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(frame: npt.NDArray[np.float32]) -> Any:
        interpreter.set_tensor(source, frame)
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return run


def median_ci(values: FloatArray, rng: np.random.Generator, draws: int = 1000, block: int = 25) -> tuple[float, float]:
    """95 % bootstrap interval of the median; blocks of neighbours are drawn, for noise comes in spells."""
    blocks = values[: len(values) // block * block].reshape(-1, block)
    chosen = rng.integers(0, len(blocks), (draws, len(blocks)))
    low, high = np.percentile(np.median(blocks[chosen].reshape(draws, -1), axis=1), (2.5, 97.5))
    return float(low), float(high)
