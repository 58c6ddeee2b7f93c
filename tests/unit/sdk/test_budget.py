"""Budgets as text, and judging a measurement."""

import pytest
from kiridashi.budget import MIB, Budget, Measurement, judge
from kiridashi.errors import BudgetError

MEASURED = Measurement(
    memory_bytes=80 * MIB,
    file_bytes=4 * MIB,
    latency_p50_ms=3.0,
    latency_p95_ms=5.0,
    latency_p99_ms=6.0,
    load_ms=30.0,
    runs=100,
    runtime="onnxruntime",
    threads=1,
    hardware="real",
)


def test_limits_and_units_are_read() -> None:
    budget = Budget.parse("memory=96MiB, file=4MB,latency=0.5s")
    assert budget == Budget(96 * MIB, 4_000_000, 500.0)
    assert Budget.parse("") == Budget()


@pytest.mark.parametrize(
    "text", ["memory=96", "memory=10MiB,memory=5MiB", "ram=5MiB", "latency=5MiB", "file=0MiB", "file", "latency=-1ms"]
)
def test_what_cannot_be_read_is_refused_with_an_example(text: str) -> None:
    if text == "memory=96":
        assert Budget.parse(text).memory_bytes == 96  # bytes need no unit
        return
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert "memory=96MiB" in caught.value.next_step


def test_text_and_budget_are_inverse() -> None:
    budget = Budget(96 * MIB, 4 * MIB, 5.0)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("budget", "exceeded"),
    [
        (Budget(), ()),
        (Budget(80 * MIB, 4 * MIB, 5.0), ()),
        (Budget(memory_bytes=80 * MIB - 1), ("memory",)),
        (Budget(file_bytes=MIB, latency_p95_ms=4.9), ("file", "latency")),
    ],
)
def test_a_limit_is_kept_when_it_is_just_reached(budget: Budget, exceeded: tuple[str, ...]) -> None:
    verdict = judge(budget, MEASURED)
    assert verdict.exceeded == exceeded
    assert verdict.within == (not exceeded)


def test_the_verdict_in_words_has_the_numbers() -> None:
    budget = Budget(latency_p95_ms=4.0)
    assert judge(budget, MEASURED).describe(budget, MEASURED) == "over the budget: p95 5 ms of 4 ms"
