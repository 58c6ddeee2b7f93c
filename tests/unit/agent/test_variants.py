from __future__ import annotations

from kiridashi.budget import MIB
from kiridashi.manifest import TrainSpec, TrainVariant
from kiridashi_agent.steps import is_harmful, pace_of
from kiridashi_agent.variants import ALLOCATOR, RUNTIME_BYTES, Choice, variants_of, work

SMALL = TrainVariant("biases", "b.onnx", ("head.weight",), 0.01, 10 * MIB, 1000, 100)
MIDDLE = TrainVariant("last-blocks", "l.onnx", ("head.weight",), 0.01, 20 * MIB, 2000, 200)
LARGE = TrainVariant("all", "a.onnx", ("head.weight",), 0.01, 100 * MIB, 10_000, 1000)


def choice(limit_mib: int, skip: tuple[str, ...] = ()) -> Choice:
    return Choice((SMALL, MIDDLE, LARGE), 50 * MIB, limit_mib * MIB, 30, skip)


def test_those_that_fit_the_memory_come_largest_first() -> None:
    assert choice(1000).fitting() == [LARGE, MIDDLE, SMALL]
    tight = choice(110)
    assert tight.fitting() == [MIDDLE, SMALL]
    assert "110 MiB" in tight.notes["all"]
    assert choice(60).fitting() == []


def test_the_estimate_counts_process_runtime_and_allocator() -> None:
    assert choice(1000).peak_bytes(LARGE) == 50 * MIB + RUNTIME_BYTES + int(ALLOCATOR * 100 * MIB)


def test_one_that_went_over_its_limit_is_not_tried_again() -> None:
    again = choice(1000, skip=("all",))
    assert again.fitting() == [MIDDLE, SMALL]
    assert again.notes["all"] == "went over the memory limit"


def test_time_is_unknown_until_one_ran_and_then_scales_with_the_work() -> None:
    known = choice(1000)
    assert known.seconds(MIDDLE) == 0.0
    known.paces_s["all"] = 2.0
    assert known.seconds(LARGE) == 60.0
    assert known.seconds(MIDDLE) == 60.0 * work(MIDDLE) / work(LARGE)
    known.paces_s["biases"] = 0.5
    assert known.seconds(MIDDLE) == 15.0 * work(MIDDLE) / work(SMALL)


def test_the_report_names_every_size() -> None:
    told = choice(110)
    told.fitting()
    told.notes["last-blocks"] = "taken"
    costs = told.costs()
    assert [cost.name for cost in costs] == ["biases", "last-blocks", "all"]
    assert [cost.outcome for cost in costs[:2]] == ["not needed", "taken"]


def test_a_bundle_without_sizes_has_the_one_it_always_had() -> None:
    spec = TrainSpec("step.onnx", "state.npz", ("a", "b"), 16, 30, 0.01, "a", "b", 1.0)
    (only,) = variants_of(spec)
    assert (only.graph, only.parameters, only.learning_rate) == ("step.onnx", ("a", "b"), 0.01)


def test_the_first_iteration_does_not_count_for_the_pace() -> None:
    assert pace_of([9.0, 1.0, 3.0]) == 2.0
    assert pace_of([9.0]) == 9.0


def test_iterations_that_end_well_above_their_start_do_harm() -> None:
    assert is_harmful([1.0, 1.5, 2.0, 1.0, 2.0])
    assert not is_harmful([1.0, 1.5, 1.2, 1.1, 0.9])
    assert not is_harmful([1.0, 9.0, 9.0])  # too few to tell
    assert not is_harmful([1.0, 2.0, float("nan"), 1.0, 1.0])  # that is divergence
