"""The budget for who names none."""

import msgspec
from kiridashi.budget import Measurement
from kiridashi_server.cut_run import default_budget

DENSE = Measurement(
    memory_bytes=100_000_000,
    file_bytes=13_000_000,
    latency_p50_ms=2.0,
    latency_p95_ms=2.5,
    latency_p99_ms=4.0,
    load_ms=50.0,
    runs=1000,
    runtime="onnxruntime",
    threads=1,
    hardware="real",
)


def test_every_limit_is_a_share_of_what_the_dense_model_needs() -> None:
    budget = default_budget(DENSE)
    assert (budget.memory_bytes, budget.file_bytes, budget.latency_p95_ms) == (90_000_000, 5_200_000, 2.0)


def test_no_latency_limit_is_taken_from_a_disturbed_tail() -> None:
    assert default_budget(msgspec.structs.replace(DENSE, latency_p95_ms=7.0)).latency_p95_ms is None
