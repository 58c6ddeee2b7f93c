"""Iterations of the train-step graph: forward, gradients and update in one run of stock onnxruntime.

Parameters and momenta stay inside the runtime from step to step (``OrtValue``), nothing is copied in between. Batches
hold every class equally often; images get a little more or less light, seeded. The learning rate falls along half a
cosine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

from kiridashi_agent.early_stop import LOOK_SHARE, Looks
from kiridashi_agent.thermostat import Thermostat

GAIN = 0.1
OFFSET = 12.0
HARM = 1.1
"""How far the last losses may be above the first: batches differ a little."""
TRIAL = 3
"""Iterations after which it is decided whether a size of the train step is quick enough."""


Look = Callable[[Mapping[str, FloatArray]], NDArray[np.bool_]]


@dataclass(frozen=True)
class StepsResult:
    """``values`` that were kept (with ``diverged`` unusable); the first and the last finite batch loss.

    Kept are those after iteration ``best``: the last one, unless it was clearly worse than an earlier one.
    ``bound`` is what ended it early: "time", "temperature", "overfitting", "divergence", or nothing.
    ``harmful``: the start was better. ``pace_s`` is the time of an iteration, the first one left out. ``too_slow``:
    given up after a few of them.
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
    best: int = 0


@dataclass(frozen=True)
class StepsPlan:
    """What to run: the graph, how often and how long, and the parameters that may change.

    A parameter outside ``trained`` is put back to its start in every iteration, because the deployed file has no
    place to write it to. With ``may_give_up`` the first iterations decide whether all of them would end within
    ``max_seconds``; otherwise as many as do are run. ``thermostat`` holds them back while the board is hot. ``look``
    says of parameters which samples of the hold-out they get right (:mod:`kiridashi_agent.early_stop`).
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
    look: Look | None = None


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
    deadline = time.monotonic() + plan.max_seconds
    graph = _Graph(plan, start)
    watch = _Watch(graph, plan.look, plan.iterations)
    losses: list[float] = []
    times: list[float] = []
    bound = ""
    too_slow = False
    for chosen in balanced_batches(samples.labels, plan.spec.batch, plan.iterations, rng):
        rate = plan.variant.learning_rate * 0.5 * (1 + math.cos(math.pi * len(losses) / plan.iterations))
        began = time.monotonic()
        losses.append(graph.step(relit(samples.images[chosen], rng), samples.labels[chosen], rate))
        ended = time.monotonic()
        times.append(ended - began)
        left = plan.iterations - len(losses)
        needed_s = left * pace_of(times) * (1 if plan.look is None else 1 + LOOK_SHARE)
        too_slow = plan.may_give_up and len(times) == TRIAL and ended + needed_s > deadline
        if too_slow:
            break
        if left or not math.isfinite(losses[-1]):
            bound = _bound(plan, watch.is_over(len(losses), sum(times)), losses, deadline)
        if bound:
            break
    best = len(losses) if too_slow else watch.end(len(losses))
    values = graph.values(watch.best)
    seen = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    return StepsResult(
        values=values,
        iterations=len(losses),
        loss_first=seen[0],
        loss_last=seen[-1],
        diverged=(bound == "divergence" and best in (0, len(losses)))
        or not all(np.isfinite(array).all() for array in values.values()),
        bound=bound,
        pace_s=pace_of(times),
        too_slow=too_slow,
        harmful=best == 0 or is_harmful(losses[:best]),
        best=best,
    )


class _Graph:
    """The train step in a session of its own. Parameters and momenta are values of the runtime and never copied."""

    def __init__(self, plan: StepsPlan, start: Mapping[str, FloatArray]) -> None:
        import onnxruntime

        self._plan = plan
        self._session = make_session(plan.graph, plan.threads, memory_pattern=False)
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        trained = plan.variant.parameters
        self._names = [*trained, *(f"momentum.{name}" for name in trained)]
        self._outputs = ["loss", *(f"new.{name}" for name in self._names)]
        _check(self._session, self._names, self._outputs, plan.graph)
        first = {name: self._value(np.ascontiguousarray(start[name], np.float32)) for name in trained}
        self.state = first | {f"momentum.{name}": self._value(np.zeros_like(start[name])) for name in trained}
        self._frozen = {name: held for name, held in first.items() if name not in plan.trained}

    def step(self, images: NDArray[np.uint8], labels: NDArray[np.int64], rate: float) -> float:
        """One iteration; the loss before it."""
        loss, *new = self._run(images, labels, rate)
        self.state = dict(zip(self._names, new, strict=True)) | self._frozen
        return float(loss.numpy())

    def values(self, state: Mapping[str, Any]) -> dict[str, FloatArray]:
        """The parameters of a state."""
        return {name: np.array(state[name].numpy(), np.float32) for name in self._plan.variant.parameters}

    def _run(self, images: NDArray[np.uint8], labels: NDArray[np.int64], rate: float) -> list[Any]:
        x = to_input(images, self._plan.preprocessing, "NCHW")
        y = np.eye(self._plan.classes, dtype=np.float32)[labels]
        inputs = {"x": self._value(x), "y": self._value(y), "lr": self._value(np.array(rate, np.float32))}
        try:
            found: list[Any] = self._session.run_with_ort_values(self._outputs, self.state | inputs)
        except refusals() as error:
            raise BundleError(f"the train step {self._plan.graph.name} failed", why=str(error)) from error
        return found


class _Watch:
    """Looks at what the parameters are worth, if that can be told, and holds on to the best state seen."""

    def __init__(self, graph: _Graph, look: Look | None, planned: int) -> None:
        self._graph, self._look = graph, look
        self._best = graph.state
        self._look_s = 0.0
        self._spent_s = 0.0
        self.looks: Looks | None = None if look is None else Looks(planned)
        self._take(0)
        self._spent_s = 0.0  # the look at the start has to be

    @property
    def best(self) -> Mapping[str, Any]:
        """The state to keep."""
        return self._graph.state if self.looks is None else self._best

    def is_over(self, iteration: int, iterations_s: float) -> bool:
        """Look if it is time to, and looking has not taken its share yet; whether the iterations should end."""
        if self.looks is None:
            return False
        affordable = self._spent_s + self._look_s <= LOOK_SHARE * iterations_s
        if self.looks.is_due(iteration) and affordable:
            self._take(iteration)
        return self.looks.is_over

    def end(self, iteration: int) -> int:
        """Look at the last state too; the iteration after which the best was seen, without any looks the last."""
        if self.looks is None:
            return iteration
        if iteration > self.looks.last:
            self._take(iteration)
        return self.looks.kept

    def _take(self, iteration: int) -> None:
        if self._look is None or self.looks is None:
            return
        began = time.monotonic()
        values = self._graph.values(self._graph.state)
        sound = all(np.isfinite(array).all() for array in values.values())
        if sound and self.looks.take(iteration, self._look(values)):
            self._best = self._graph.state
        self.looks.last = iteration
        self._look_s = time.monotonic() - began
        self._spent_s += self._look_s


def _bound(plan: StepsPlan, over: bool, losses: Sequence[float], deadline: float) -> str:
    """What forbids another iteration, if anything does; waits while the board is hot."""
    if not math.isfinite(losses[-1]):
        return "divergence"
    if over:
        return "overfitting"
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
