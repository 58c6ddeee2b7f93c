"""What a train step costs: time beside torch, exactness, memory of fresh processes, and the size of an installation."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kiridashi_agent.variants import ALLOCATOR, RUNTIME_BYTES
from kiridashi_server.export.npz import deterministic_npz
from kiridashi_server.export.train_step_parity import relative_gap
from kiridashi_server.export.train_step_variants import Variant

from benchmarks.trainstep_subject import FloatArray, OnnxStep, Subject, TorchStep, a_batch

_RATE, _WARM = 1e-4, 2


def step_times(subject: Subject, variant: Variant, pixels: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time of a step: ours, and torch's in both memory formats, taking turns."""
    x, y = a_batch(pixels, 0)
    steps: dict[str, Callable[[FloatArray, FloatArray, float], float]] = {"ours": _ours(subject, variant)}
    for name, form in (("torch", torch.contiguous_format), ("torch_channels_last", torch.channels_last)):
        steps[name] = TorchStep(copy.deepcopy(subject.model), variant.entry.parameters, form)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_WARM + rounds):
        for name, step in steps.items():
            start = time.process_time()
            step(x, y, _RATE)
            times[name].append(time.process_time() - start)
    return {f"{name}_ms": 1e3 * float(np.median(values[_WARM:])) for name, values in times.items()}


def gradient_errors(subject: Subject, variant: Variant, pixels: int) -> dict[str, float]:
    """The first clipped gradients: ours from torch in float32, and both from torch in float64."""
    x, y = a_batch(pixels, 1)
    names = variant.entry.parameters
    ours = _ours(subject, variant)
    ours(x, y, _RATE)
    found = [ours.state[f"momentum.{name}"].numpy() for name in names]
    single, double = (_torch_gradients(subject, names, kind, x, y) for kind in (torch.float32, torch.float64))
    return {
        "from_torch": relative_gap(found, single),
        "from_float64": relative_gap(found, double),
        "torch_from_float64": relative_gap(single, double),
    }


def peak_memory(subject: Subject, variant: Variant, pixels: int, scratch: Path) -> dict[str, int]:
    """Peak resident bytes of fresh processes that make three steps, and the device's estimate for ours."""
    names = variant.entry.parameters
    deterministic_npz(scratch / "values.npz", {name: subject.values[name] for name in names})
    torch.save((subject.model, names), scratch / "model.pt")
    ours = _child("ours", subject.folder / variant.entry.graph, scratch / "values.npz", pixels)
    theirs = min(_child(form, scratch / "model.pt", scratch, pixels)["peak"] for form in ("torch", "channels_last"))
    estimate = ours["before"] + RUNTIME_BYTES + int(ALLOCATOR * variant.entry.peak_bytes)
    return {"ours_bytes": ours["peak"], "torch_bytes": theirs, "estimate_bytes": estimate}


def installed_bytes(*distributions: str) -> int:
    """Bytes of the files of these distributions and of all that they require, each counted once."""
    seen: set[str] = set()
    waiting = list(distributions)
    total = 0
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or an extra that is not here
        paths = [Path(str(file.locate())) for file in found.files or ()]
        total += sum(path.stat().st_size for path in paths if path.is_file())
        required = [one for one in found.requires or () if "extra ==" not in one]
        waiting += [match.group() for one in required if (match := re.match(r"[A-Za-z0-9._-]+", one))]
    return total


def _ours(subject: Subject, variant: Variant) -> OnnxStep:
    values = {name: subject.values[name] for name in variant.entry.parameters}
    return OnnxStep(subject.folder / variant.entry.graph, values)


def _torch_gradients(
    subject: Subject, names: tuple[str, ...], kind: torch.dtype, x: FloatArray, y: FloatArray
) -> list[Any]:
    step = TorchStep(copy.deepcopy(subject.model).to(kind), names, torch.contiguous_format)
    step(x, y, _RATE)
    return [parameter.grad.numpy() for parameter in step.trained if parameter.grad is not None]


def _child(kind: str, file: Path, other: Path, pixels: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.trainstep_child", kind, str(file), str(other), str(pixels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result
