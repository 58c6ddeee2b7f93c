"""A process that makes three train steps, for the benchmark of memory: ``ours`` has no training framework in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

_BATCH, _CLASSES, _STEPS, _RATE = 16, 12, 3, 1e-4


def main(kind: str, file: str, other: str, pixels: str) -> int:
    """Print ``{"before", "peak"}``: resident bytes before the model is loaded, and at most."""
    x = np.random.default_rng(0).standard_normal((_BATCH, 3, int(pixels), int(pixels))).astype(np.float32)
    y = np.eye(_CLASSES, dtype=np.float32)[np.arange(_BATCH) % _CLASSES]
    before = _ours(Path(file), Path(other), x, y) if kind == "ours" else _torch(Path(file), kind, x, y)
    sys.stdout.write(json.dumps({"before": before, "peak": _status("VmHWM")}) + "\n")
    return 0


def _ours(graph: Path, values: Path, x: np.ndarray, y: np.ndarray) -> int:
    import onnxruntime
    from kiridashi.runtime.onnx import make_session

    value = onnxruntime.OrtValue.ortvalue_from_numpy
    before = _status("VmRSS")
    session = make_session(graph, 1, memory_pattern=False)
    with np.load(values) as file:
        state = {name: value(file[name]) for name in file.files}
    state |= {f"momentum.{name}": value(np.zeros_like(held.numpy())) for name, held in state.items()}
    given = {"x": value(x), "y": value(y), "lr": value(np.array(_RATE, np.float32))}
    outputs = ["loss", *(f"new.{name}" for name in state)]
    for _ in range(_STEPS):
        _, *new = session.run_with_ort_values(outputs, state | given)
        state = dict(zip(state, new, strict=True))
    return before


def _torch(file: Path, kind: str, x: np.ndarray, y: np.ndarray) -> int:
    import torch

    torch.set_num_threads(1)
    form = torch.channels_last if kind == "channels_last" else torch.contiguous_format
    before = _status("VmRSS")
    model, names = torch.load(file, weights_only=False)
    model = model.requires_grad_(False).to(memory_format=form)
    known = dict(model.named_parameters())
    trained = [known[name].requires_grad_() for name in names]
    optimiser = torch.optim.SGD(trained, lr=_RATE, momentum=0.9)
    images, labels = torch.from_numpy(x).contiguous(memory_format=form), torch.from_numpy(y)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    return before


def _status(name: str) -> int:
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines() if ":" in row)
    return int(rows[name].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
