"""A new model that hangs, crashes its runtime, or eats memory: refused by name, while the old one keeps serving."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_models import greedy, never_ending
from control_groups import small_device
from fault_place import FaultPlace, FaultyDevice, line_working
from kiridashi.budget import MIB, Budget

MEASURE = 51


def refused(place: FaultPlace, device: FaultyDevice, kind: str, phase: str) -> str:
    """The device refuses what is wanted while its line goes on; the report's message."""
    with line_working(device.state) as line:
        code, told = device.once()
    assert (code, told["phase"], told["slot"]) == (MEASURE, "rejected", "a"), told
    error = told["error"]
    assert (error["kind"], error["phase"]) == (kind, phase), told
    assert line.digests == [place.v1.digest] == [device.digest()]
    assert list((device.line_folder / "b").iterdir()) == []
    return str(error["message"])


def test_a_model_that_hangs(faults: FaultPlace) -> None:
    faults.want(faults.publish(onnx_fp32=never_ending()))
    message = refused(faults, faults.device(job_timeout_s=4.0), "JobTimeoutError", "probing")
    assert "model.onnx" in message
    assert "did not end within 4 s and was killed" in message


@pytest.mark.parametrize("job", ["probe", "measure"])
def test_a_model_that_crashes_the_runtime(faults: FaultPlace, job: str) -> None:
    faults.want(faults.publish())
    device = faults.device()
    device.faults["in_job"] = [job, "crash"]
    message = refused(faults, device, "JobCrashedError", {"probe": "probing", "measure": "measuring"}[job])
    assert "was ended by SIGSEGV" in message


def test_a_model_that_eats_memory(faults: FaultPlace) -> None:
    faults.want(faults.publish(budget=Budget(memory_bytes=40 * MIB), onnx_fp32=greedy(600)))
    message = refused(faults, faults.device(), "MemoryLimitError", "probing")
    assert "more memory than its limit of 168 MiB" in message


def test_memory_runs_out_while_measuring(faults: FaultPlace) -> None:
    faults.want(faults.publish(budget=Budget(memory_bytes=100 * MIB)))
    device = faults.device()
    device.faults["in_job"] = ["measure", "eat-memory"]
    message = refused(faults, device, "MemoryLimitError", "measuring")
    assert "more memory than its limit of 228 MiB" in message


def goes_live_untuned(place: FaultPlace, device: FaultyDevice) -> str:
    """The new version goes live as it was shipped; what the report says of tuning."""
    with line_working(device.state) as line:
        code, told = device.once(timeout_s=600)
    assert code == 0, told
    assert (told["phase"], told["slot"], told["tuned"]) == ("active", "b", False), told
    assert told["error"]["phase"] == "tuning"
    assert line.digests == [place.v1.digest, device.digest()]
    assert {path.name for path in (device.line_folder / "b").iterdir()} == {
        "manifest.json", "model.onnx", "probe.npz", "train_state.npz", "train_step.onnx",
    }  # fmt: skip
    return str(told["error"]["message"])


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("run-out-of-memory", "more memory than"),
        ("crash", "SIGSEGV"),
        pytest.param(
            "hang", "was killed", marks=[pytest.mark.slow, pytest.mark.timeout(900)]
        ),  # five minutes are spare
    ],
)
def test_tuning_that_fails_leaves_the_shipped_model(faults: FaultPlace, deed: str, words: str) -> None:
    faults.want(faults.publish())
    device = faults.device(samples=faults.samples, job_timeout_s=6.0, tune_seconds=1.0)
    device.faults["in_job"] = ["tune", deed]
    assert words in goes_live_untuned(faults, device)


def test_the_kernel_ends_tuning_and_never_the_agent(faults: FaultPlace, tmp_path: Path) -> None:
    """The whole agent in a group of 200 MiB: when tuning eats them, the kernel must choose that child."""
    faults.want(faults.publish())
    device = faults.device(samples=faults.samples)
    device.faults["in_job"] = ["tune", "eat-memory"]
    with small_device(200 * MIB) as small:
        device.inside = small
        message = goes_live_untuned(faults, device)
        assert small.oom_kills() >= 1 or "limit of" in message
    assert "memory" in message
