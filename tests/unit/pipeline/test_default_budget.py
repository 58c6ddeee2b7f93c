"""The budget for who names none."""

import msgspec
import pytest
from kiridashi_server.budget import Profile, ProfilePoint
from kiridashi_server.cut_run import default_budget

DENSE = ProfilePoint(
    widths={},
    quiet_ms=2.0,
    latency_p50_ms=2.4,
    latency_p95_ms=30.0,
    memory_bytes=100_000_000,
    file_bytes=13_000_000,
)
PROFILE = Profile(
    device_class="bench",
    hardware="real",
    runtime_name="onnxruntime",
    runtime="onnxruntime 1",
    threads=1,
    backbone_fingerprint="",
    layout_digest="",
    macs=1,
    points=(DENSE,),
    block=8,
    multiple=8,
    block_errors={},
    cliffs={},
    memory={},
    file={},
    latency={},
    tail=1.25,
    noise=0.0,
    error={"memory": 0.0, "file": 0.0, "latency": 0.0},
)


def test_every_limit_is_a_share_of_what_the_dense_model_needs() -> None:
    budget = default_budget(PROFILE)
    assert (budget.memory_bytes, budget.file_bytes) == (90_000_000, 5_200_000)
    assert budget.latency_p95_ms == pytest.approx(2.0)


def test_no_latency_limit_is_taken_from_disturbed_tails() -> None:
    assert default_budget(msgspec.structs.replace(PROFILE, tail=3.5)).latency_p95_ms is None
