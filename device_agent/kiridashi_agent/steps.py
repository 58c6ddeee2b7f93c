"""Iterations of the train-step graph: forward, gradients and update in one run of stock onnxruntime.

Parameters and momenta stay inside the runtime from step to step (``OrtValue``), nothing is copied in between. Batches
hold every class equally often; images get a little more or less light, seeded. The learning rate falls along half a
cosine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kiridashi.errors import BundleError
from kiridashi.manifest import Preprocessing, TrainSpec, TrainVariant
from kiridashi.preprocess import to_input
from kiridashi.runtime.onnx import make_session, refusals
from kiridashi.runtime.protocol import FloatArray
from kiridashi.samples import Samples
from numpy.typing import NDArray

from kiridashi_agent.thermostat import Thermostat

GAIN = 0.1
OFFSET = 12.0
HARM = 1.1
"""How far the last losses may be above the first: batches differ a little."""
TRIAL = 3
"""Iterations after which it is decided whether a size of the train step is quick enough."""


@dataclass(frozen=True)
class StepsResult:
    """``values`` after the last iteration (with ``diverged`` unusable); the first and the last finite batch loss.

    ``bound`` is what ended it early: "time", "temperature", or nothing.
    ``harmful``: the last losses are clearly above the first one, so the start was better. ``pace_s`` is the time of an
    iteration, the first one left out. ``too_slow``: given up after a few of them.
    """

    values: dict[str, FloatArray]
    iterations: int
    loss_first: float
    loss_last: float
    diverged: bool
    bound: str = ""
    pace_s: float = 0.0
    too_slow: bool = False
    harmful: bool = False


@dataclass(frozen=True)
class StepsPlan:
    """What to run: the graph, how often and how long, and the parameters that may change.

    A parameter outside ``trained`` is put back to its start in every iteration, because the deployed file has no
    place to write it to. With ``may_give_up`` the first iterations decide whether all of them would end within
    ``max_seconds``; otherwise as many as do are run. ``thermostat`` holds them back while the board is hot.
    """

    graph: Path
    spec: TrainSpec
    variant: TrainVariant
    may_give_up: bool
    preprocessing: Preprocessing
    classes: int
    iterations: int
    max_seconds: float
    threads: int
    trained: Collection[str]
    thermostat: Thermostat | None = None


def run_steps(
    plan: StepsPlan, start: Mapping[str, FloatArray], samples: Samples, rng: np.random.Generator
) -> StepsResult:
    """Train from ``start`` on ``samples``.

    Args:
        plan: the graph and its limits; at least one iteration is run.
        start: every parameter of the graph, in its own shape.
        samples: what to learn from; every class at least once.
        rng: draws the batches and the light.

    Raises:
        BundleError: the graph does not keep its contract, or onnxruntime refuses it.
    """
    import onnxruntime

    deadline = time.monotonic() + plan.max_seconds
    session = make_session(plan.graph, plan.threads, memory_pattern=False)
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    trained = plan.variant.parameters
    names = [*trained, *(f"momentum.{name}" for name in trained)]
    outputs = ["loss", *(f"new.{name}" for name in names)]
    _check(session, names, outputs, plan.graph)
    first = {name: value(np.ascontiguousarray(start[name], np.float32)) for name in trained}
    state = first | {f"momentum.{name}": value(np.zeros_like(start[name])) for name in trained}
    frozen = {name: held for name, held in first.items() if name not in plan.trained}
    losses: list[float] = []
    bound = ""
    times: list[float] = []
    too_slow = False
    for chosen in balanced_batches(samples.labels, plan.spec.batch, plan.iterations, rng):
        x = to_input(relit(samples.images[chosen], rng), plan.preprocessing, "NCHW")
        y = np.eye(plan.classes, dtype=np.float32)[samples.labels[chosen]]
        rate = plan.variant.learning_rate * 0.5 * (1 + math.cos(math.pi * len(losses) / plan.iterations))
        inputs = {"x": value(x), "y": value(y), "lr": value(np.array(rate, np.float32))}
        began = time.monotonic()
        try:
            loss, *new = session.run_with_ort_values(outputs, state | inputs)
        except refusals() as error:
            raise BundleError(f"the train step {plan.graph.name} failed", why=str(error)) from error
        state = dict(zip(names, new, strict=True)) | frozen
        losses.append(float(loss.numpy()))
        ended = time.monotonic()
        times.append(ended - began)
        left = plan.iterations - len(losses)
        too_slow = plan.may_give_up and len(times) == TRIAL and ended + left * pace_of(times) > deadline
        bound = _bound(plan, deadline) if left and not too_slow else ""
        if too_slow or bound or not math.isfinite(losses[-1]):
            break
    values = {name: np.array(state[name].numpy(), np.float32) for name in trained}
    seen = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    diverged = not (math.isfinite(losses[-1]) and all(np.isfinite(array).all() for array in values.values()))
    return StepsResult(
        values, len(losses), seen[0], seen[-1], diverged, bound, pace_of(times), too_slow, is_harmful(losses)
    )


def _bound(plan: StepsPlan, deadline: float) -> str:
    """What forbids another iteration, if anything does; waits while the board is hot."""
    if plan.thermostat is not None and not plan.thermostat.may_go_on(deadline):
        return "temperature"
    return "time" if time.monotonic() > deadline else ""


def is_harmful(losses: Sequence[float]) -> bool:
    """Whether the mean of the last losses is more than a tenth above the first, which is that of the start."""
    return len(losses) > TRIAL and float(np.mean(losses[-TRIAL:])) > HARM * losses[0]


def pace_of(seconds: Sequence[float]) -> float:
    """The usual time of an iteration: the median, without the first one, which also allocates."""
    return float(np.median(seconds[1:] or seconds))


def balanced_batches(
    labels: NDArray[np.int64], batch: int, iterations: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Positions [batch] per iteration. Classes take turns, and so do the samples of a class, in shuffled order."""
    members = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
    waiting: dict[int, list[int]] = {c: [] for c in members}
    turns: list[int] = []
    for _ in range(iterations):
        chosen = []
        for _ in range(batch):
            turns = turns or [int(c) for c in rng.permutation(list(members))]
            label = turns.pop()
            waiting[label] = waiting[label] or [int(n) for n in rng.permutation(members[label])]
            chosen.append(waiting[label].pop())
        yield np.array(chosen, np.int64)


def relit(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images [N, H, W, 3], each under a slightly different light: contrast ±10 %, brightness ±12 of 255."""
    gain = rng.uniform(1 - GAIN, 1 + GAIN, (len(images), 1, 1, 1)).astype(np.float32)
    offset = rng.uniform(-OFFSET, OFFSET, (len(images), 1, 1, 1)).astype(np.float32)
    levels: FloatArray = np.clip(np.rint(images * gain + offset), 0, 255)
    return levels.astype(np.uint8)


def _check(session: Any, names: Collection[str], outputs: Collection[str], graph: Path) -> None:
    taken = {item.name for item in session.get_inputs()}
    given = {item.name for item in session.get_outputs()}
    missing = ({"x", "y", "lr", *names} - taken) | (set(outputs) - given)
    if missing or taken - {"x", "y", "lr", *names}:
        raise BundleError(
            f"{graph.name} is not the train step that the manifest describes",
            why=f"inputs or outputs differ: {', '.join(sorted(missing) or sorted(taken - set(names)))}",
            next_step="export the bundle again",
        )
