from __future__ import annotations

from dataclasses import replace

import pytest
from kiridashi.budget import Budget, Measurement
from kiridashi.errors import RuntimeUnavailableError
from kiridashi.messages import ArtifactTrial
from kiridashi_agent.choice import (
    can_be_tuned,
    candidates,
    explained,
    fastest_within,
    judged,
    nearest,
    needed_files,
)
from kiridashi_agent.process import JobTimeoutError
from tiny_bundle import make_bundle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def names(artifacts) -> list[str]:
    return [artifact.name for artifact in artifacts]


def measured(manifest, name: str, p95: float, budget: Budget, memory: int = 10):
    measurement = Measurement(memory, 5, p95, p95, p95, 1.0, 10, "onnxruntime", 1, "real")
    return judged(manifest.artifact(name), budget, measurement)


@pytest.mark.parametrize(
    ("runtimes", "preferred", "expected"),
    [
        ({"onnxruntime", "litert"}, "auto", ["model.onnx", "model.int8.onnx", "model.tflite"]),
        ({"onnxruntime", "litert"}, "litert", ["model.tflite"]),
        ({"onnxruntime"}, "auto", ["model.onnx", "model.int8.onnx"]),
    ],
)
def test_candidates_follow_what_is_installed_and_preferred(manifest, runtimes, preferred, expected) -> None:
    assert names(candidates(manifest, runtimes, preferred)) == expected


@pytest.mark.parametrize(("runtimes", "preferred"), [(set(), "auto"), ({"onnxruntime"}, "litert")])
def test_no_candidate_names_what_is_offered_and_installed(manifest, runtimes, preferred) -> None:
    with pytest.raises(RuntimeUnavailableError, match="litert and onnxruntime; installed here"):
        candidates(manifest, runtimes, preferred)


def test_only_float_files_with_places_can_be_tuned(manifest) -> None:
    assert names(a for a in manifest.artifacts if can_be_tuned(manifest, a)) == ["model.onnx", "model.tflite"]


def test_only_what_is_needed_is_fetched(manifest) -> None:
    lite = candidates(manifest, {"litert"}, "auto")
    assert names(needed_files(manifest, lite, tune=False)) == ["model.tflite", "probe.npz"]
    assert set(names(needed_files(manifest, lite, tune=True))) == set(names(manifest.artifacts)) - {"model.int8.onnx"}


def test_the_fastest_inside_the_budget_is_chosen(manifest) -> None:
    budget = Budget(latency_p95_ms=3.0, memory_bytes=10)
    entries = [
        measured(manifest, "model.onnx", 2.0, budget),
        measured(manifest, "model.int8.onnx", 1.0, budget, memory=11),
        measured(manifest, "model.tflite", 2.5, budget),
    ]
    assert fastest_within(entries).artifact == "model.onnx"


def test_every_file_has_its_reason(manifest) -> None:
    budget = Budget(latency_p95_ms=3.0)
    trials = [
        ArtifactTrial("model.onnx"),
        ArtifactTrial("model.int8.onnx", reason="lost 20% of the frames"),
        ArtifactTrial("model.tflite"),
        ArtifactTrial("slow"),
        ArtifactTrial("hung"),
        ArtifactTrial("left"),
    ]
    entries = [
        measured(manifest, "model.onnx", 2.0, budget),
        measured(manifest, "model.tflite", 1.5, budget),
        replace(measured(manifest, "model.onnx", 4.0, budget), artifact="slow"),
    ]
    found = explained(trials, entries, {"hung": JobTimeoutError("it hung")}, budget, entries[1])
    assert [(trial.artifact, trial.chosen, trial.within) for trial in found] == [
        ("model.onnx", False, True),
        ("model.int8.onnx", False, None),
        ("model.tflite", True, True),
        ("slow", False, False),
        ("hung", False, None),
        ("left", False, None),
    ]
    assert [trial.reason for trial in found] == [
        "inside the budget, and slower than model.tflite",
        "lost 20% of the frames",
        "the fastest that passed every gate",
        "over the budget: p95 4 ms of 3 ms",
        "could not be measured: it hung",
        "not measured: files that can be tuned go first",
    ]
    assert found[2].latency_p95_ms == 1.5


def test_of_those_over_it_the_nearest_is_reported(manifest) -> None:
    budget = Budget(latency_p95_ms=1.0, memory_bytes=10)
    entries = [
        measured(manifest, "model.onnx", 1.5, budget, memory=11),
        measured(manifest, "model.int8.onnx", 4.0, budget),
        measured(manifest, "model.tflite", 3.0, budget),
    ]
    assert fastest_within(entries) is None
    assert nearest(entries).artifact == "model.tflite"
    assert nearest([]) is None
