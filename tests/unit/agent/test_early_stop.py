"""When iterations end early, and whose weights are kept. The train step is a stand-in with scripted losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kiridashi.manifest import Preprocessing, TrainSpec, TrainVariant
from kiridashi.samples import Samples
from kiridashi_agent import steps
from kiridashi_agent.early_stop import EVERY, LOOK_SHARE, MOST, looked_at
from kiridashi_agent.steps import StepsPlan, StepsResult, run_steps

SPEC = TrainSpec("t.onnx", "", ("w",), 8, 0, 0.1, "w", "b", 1.0)
VARIANT = TrainVariant("all", "t.onnx", ("w",), 0.1, 0, 0, 0)


class ScriptedGraph:
    """Its only value is the number of the iteration; every iteration takes a second of the test's clock."""

    now = 0.0
    trained: Any = 1.0

    def __init__(self, _plan: StepsPlan, _start: Any) -> None:
        self.state = {"w": 0}

    def step(self, *_: Any) -> float:
        ScriptedGraph.now += 1.0
        self.state = {"w": self.state["w"] + 1}
        return float(self.trained)

    def values(self, state: dict[str, int]) -> dict[str, Any]:
        return {"w": np.array([state["w"]], np.float32)}


def samples(count: int) -> Samples:
    return Samples(np.zeros((count, 4, 4, 3), np.uint8), np.arange(count) % 2, np.zeros(count, np.bool_))


class Look:
    """Of 40 samples, the first so many are right as it is written down; each look takes ``cost_s``."""

    def __init__(self, script: tuple[int, ...], cost_s: float = 0.0) -> None:
        self.script, self.cost_s, self.at = script, cost_s, list[int]()

    def __call__(self, values: Mapping[str, Any]) -> np.ndarray:
        ScriptedGraph.now += self.cost_s
        self.at.append(int(values["w"][0]))
        return np.arange(40) < self.script[min(len(self.at), len(self.script)) - 1]


def run(monkeypatch: pytest.MonkeyPatch, look: Look | None, iterations: int) -> StepsResult:
    monkeypatch.setattr(steps, "_Graph", ScriptedGraph)
    monkeypatch.setattr(steps.time, "monotonic", lambda: ScriptedGraph.now)
    frame = Preprocessing(4, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    plan = StepsPlan(Path("t.onnx"), SPEC, VARIANT, False, frame, 2, iterations, 1e6, 1, ("w",), look=look)
    return run_steps(plan, {}, samples(20), np.random.default_rng(0))


def test_it_stops_when_it_is_clearly_worse_for_long_and_keeps_what_was_good(monkeypatch) -> None:
    found = run(monkeypatch, Look((20, 28, 31, 20)), 100)
    assert (found.iterations, found.best, found.bound) == (80, 55, "overfitting")
    assert found.values["w"].tolist() == [55]
    assert (found.harmful, found.diverged) == (False, False)


def test_what_chance_explains_changes_nothing(monkeypatch) -> None:
    found = run(monkeypatch, Look((20, 28, 31, 28)), 100)  # three of 31 fewer: p = 1/8
    assert (found.iterations, found.best, found.bound) == (100, 100, "")


def test_many_small_losses_add_up(monkeypatch) -> None:
    found = run(monkeypatch, Look((20, 31, 29, 27, 25, 23)), 100)
    assert (found.best, found.bound) == (60, "overfitting")  # of 31: p = 1/4 at 29, 1/16 at 27, 1/64 at 25


def test_the_last_weights_are_looked_at_too(monkeypatch) -> None:
    found = run(monkeypatch, Look((20, 30, 10)), EVERY + 2)
    assert (found.iterations, found.best, found.bound, found.values["w"].tolist()) == (7, 5, "", [5])


def test_if_all_are_clearly_worse_than_the_start_the_iterations_were_harmful(monkeypatch) -> None:
    found = run(monkeypatch, Look((35, 20)), 100)
    assert (found.iterations, found.best, found.harmful, found.values["w"].tolist()) == (75, 0, True, [0])


def test_what_was_good_before_a_divergence_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(ScriptedGraph, "trained", property(lambda self: float("nan") if self.state["w"] == 57 else 1.0))
    found = run(monkeypatch, Look((9, 35, 8)), 100)
    assert (found.iterations, found.best, found.bound, found.diverged) == (57, 50, "divergence", False)
    assert found.values["w"].tolist() == [50]


def test_nothing_is_looked_at_before_half_of_the_iterations(monkeypatch) -> None:
    look = Look((9,))
    run(monkeypatch, look, 40)
    assert look.at == [0, 20, 25, 30, 35, 40]


@pytest.mark.parametrize("cost_s", [0.1, 3.0, 50.0])
def test_looking_takes_at_most_its_share_of_the_iterations_time(monkeypatch, cost_s: float) -> None:
    look = Look((9,), cost_s)
    run(monkeypatch, look, 60)
    between = [at for at in look.at if at not in (0, 60)]
    assert len(between) * cost_s <= LOOK_SHARE * 60
    assert (look.at[0], look.at[-1]) == (0, 60)


def test_without_looks_all_are_run_and_the_last_are_kept(monkeypatch) -> None:
    found = run(monkeypatch, None, 30)
    assert (found.iterations, found.best, found.bound, found.values["w"].tolist()) == (30, 30, "", [30])


def test_of_every_class_alike_is_looked_at_and_never_too_many() -> None:
    labels = np.repeat([0, 1, 2], [20, 200, 1000])
    assert np.bincount(labels[looked_at(labels)]).tolist() == [20, MOST // 3, MOST // 3]
    assert looked_at(np.arange(300)).all()  # one of each class, at least
