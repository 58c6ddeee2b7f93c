"""When iterations end early, and whose weights are kept. The train step is a stand-in with scripted losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kiridashi.manifest import Preprocessing, TrainSpec, TrainVariant
from kiridashi.samples import Samples
from kiridashi_agent import steps
from kiridashi_agent.early_stop import EVERY, LEAST, PATIENCE, Looks, set_aside
from kiridashi_agent.steps import StepsPlan, StepsResult, run_steps

BATCH = 8
SPEC = TrainSpec("t.onnx", "", ("w",), BATCH, 0, 0.1, "w", "b", 1.0)
VARIANT = TrainVariant("all", "t.onnx", ("w",), 0.1, 0, 0, 0)


class ScriptedGraph:
    """Its only value is the number of the iteration; the losses of the samples set aside are ``script``'s."""

    script: tuple[float, ...] = ()
    trained = 1.0
    looked = 0

    def __init__(self, _plan: StepsPlan, _start: Any) -> None:
        self.state = {"w": 0}
        type(self).looked = 0

    def step(self, *_: Any) -> float:
        self.state = {"w": self.state["w"] + 1}
        return self.trained

    def loss(self, *_: Any) -> float:
        ScriptedGraph.looked += 1
        return self.script[ScriptedGraph.looked - 1]

    def values(self, state: dict[str, int]) -> dict[str, Any]:
        return {"w": np.array([state["w"]], np.float32)}


def samples(count: int) -> Samples:
    return Samples(np.zeros((count, 4, 4, 3), np.uint8), np.arange(count) % 2, np.zeros(count, np.bool_))


def run(monkeypatch: pytest.MonkeyPatch, script: tuple[float, ...], iterations: int, aside: int = BATCH) -> StepsResult:
    monkeypatch.setattr(steps, "_Graph", ScriptedGraph)
    monkeypatch.setattr(ScriptedGraph, "script", script)
    look = Preprocessing(4, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    plan = StepsPlan(Path("t.onnx"), SPEC, VARIANT, False, look, 2, iterations, 60.0, 1, ("w",), aside=samples(aside))
    return run_steps(plan, {}, samples(20), np.random.default_rng(0))


def test_it_stops_after_three_looks_without_a_gain_and_keeps_the_best(monkeypatch) -> None:
    found = run(monkeypatch, (1.0, 0.5, 0.4, 0.6, 0.41, 0.5), 100)
    assert (found.iterations, found.best, found.bound) == (5 * EVERY, 2 * EVERY, "no improvement")
    assert found.values["w"].tolist() == [2 * EVERY]
    assert (found.harmful, found.diverged) == (False, False)


def test_the_last_weights_are_looked_at_too(monkeypatch) -> None:
    found = run(monkeypatch, (1.0, 0.5, 0.4), EVERY + 2)
    assert (found.iterations, found.best, found.bound, found.values["w"].tolist()) == (7, 7, "", [7])


def test_if_nothing_is_better_than_the_start_the_iterations_were_harmful(monkeypatch) -> None:
    found = run(monkeypatch, (1.0, 1.1, 1.2, 1.3), 100)
    assert (found.iterations, found.best, found.harmful, found.values["w"].tolist()) == (PATIENCE * EVERY, 0, True, [0])


def test_what_was_good_before_a_divergence_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(ScriptedGraph, "trained", property(lambda self: float("nan") if self.state["w"] == 7 else 1.0))
    found = run(monkeypatch, (1.0, 0.5, float("nan")), 100)
    assert (found.iterations, found.best, found.bound, found.diverged) == (7, EVERY, "divergence", False)
    assert found.values["w"].tolist() == [EVERY]


@pytest.mark.parametrize("batches", [1, 3])
def test_looking_takes_at_most_a_fifth_of_the_iterations(monkeypatch, batches: int) -> None:
    run(monkeypatch, tuple(1.0 / n for n in range(1, 200)), 60, aside=batches * BATCH)
    assert ScriptedGraph.looked <= 60 / EVERY + batches


def test_without_samples_set_aside_all_are_run_and_the_last_are_kept(monkeypatch) -> None:
    found = run(monkeypatch, (), 30, aside=0)
    assert (found.iterations, found.best, found.bound, found.values["w"].tolist()) == (30, 30, "", [30])


def test_a_look_without_a_loss_is_no_gain() -> None:
    looks = Looks()
    assert looks.take(0, 1.0)
    assert not looks.take(5, float("nan"))
    assert (looks.best_iteration, looks.waited) == (0, 1)


def test_every_class_gives_alike_and_never_more_than_a_batch() -> None:
    labels = np.repeat([0, 1, 2], [10, 50, 400])
    aside = set_aside(labels, 16, np.random.default_rng(0))
    assert np.bincount(labels[aside]).tolist() == [2, 5, 5]
    np.testing.assert_array_equal(aside, set_aside(labels, 16, np.random.default_rng(0)))


def test_a_class_with_few_samples_needs_them_all() -> None:
    labels = np.repeat([0, 1], [LEAST - 1, 100])
    assert not set_aside(labels, 16, np.random.default_rng(0)).any()
