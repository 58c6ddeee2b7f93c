"""The pure parts of probing and measuring: the rule, the timing loop, what the machine says."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from kiridashi.errors import BundleError
from kiridashi.manifest import Artifact
from kiridashi.runtime.litert import _dequantise, _quantise
from kiridashi_agent.cage import open_cage
from kiridashi_agent.jobs import MeasureRequest
from kiridashi_agent.machine import conditions, hardware_kind
from kiridashi_agent.measure import settled_runs, time_runs, warm_up
from kiridashi_agent.probe import compare

EXPECTED = np.array([[4.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 3.0]], np.float32)


def artifact(kind: str) -> Artifact:
    return Artifact(name="m", kind=kind, bytes=1, sha256="0" * 64, chunks=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "difference", "passes"),
    [
        ("onnx-fp32", 0.0039, True),
        ("onnx-fp32", 0.0041, False),
        ("onnx-fp32", float("nan"), False),
        ("tflite-fp16", 0.079, True),
        ("tflite-fp16", 0.081, False),
        ("tflite-int8", 0.9, True),
        ("tflite-int8", 1.1, False),
    ],
)
def test_probe_rule(kind: str, difference: float, passes: bool) -> None:
    got = EXPECTED + np.float32(difference)
    if passes:
        assert compare(artifact(kind), EXPECTED, got, "rt").max_abs_diff == pytest.approx(difference, rel=1e-3)
    else:
        with pytest.raises(BundleError, match="other outputs here"):
            compare(artifact(kind), EXPECTED, got, "rt")


def test_int8_must_agree_on_the_class_and_not_only_be_near() -> None:
    near_ties = np.array([[0.1, 0.0], [0.0, 0.1], [0.1, 0.0], [0.0, 0.1]], np.float32)
    swapped = near_ties[:, ::-1].copy()
    with pytest.raises(BundleError, match="0% of 4 frames"):
        compare(artifact("onnx-int8"), near_ties, swapped, "rt")


def test_logits_of_another_shape() -> None:
    with pytest.raises(BundleError, match="logits"):
        compare(artifact("onnx-fp32"), EXPECTED, EXPECTED[:, :1], "rt")


def timed(latency_s: float, **settings: float) -> np.ndarray:
    now = itertools.count(0.0, latency_s / 1)
    request = MeasureRequest("x", **settings)  # type: ignore[arg-type]
    return time_runs(lambda _: None, request, lambda: next(now))


def test_fast_models_are_timed_up_to_the_greatest_number() -> None:
    times = timed(1e-6, runs=100, max_runs=500, seconds=2.0)
    assert len(times) == 500
    np.testing.assert_allclose(times, 1e-3)


def test_slow_models_get_the_least_number_or_are_given_up_on() -> None:
    assert len(timed(0.1, runs=100, max_runs=500, seconds=2.0)) == 100
    assert len(timed(10.0, runs=100, max_runs=500, seconds=2.0)) == 20


def test_what_is_done_between_the_runs_is_not_timed() -> None:
    now = [0.0]

    def take(seconds: float) -> None:
        now[0] += seconds

    times = time_runs(
        lambda _: take(0.01), MeasureRequest("x", runs=5, seconds=0.1), lambda: now[0], between=lambda _: take(1.0)
    )
    np.testing.assert_allclose(times, 10.0)


def test_warming_up_ends_with_its_number_or_its_time() -> None:
    for latency_s, wanted in ((0.001, 10), (1.0, 3)):
        calls, ticks = [], itertools.count(0.0, latency_s)
        warm_up(calls.append, MeasureRequest("x", warmup=10, seconds=2.0), lambda ticks=ticks: next(ticks))
        assert len(calls) == wanted


@pytest.mark.parametrize(
    ("modalias", "machine", "kind"),
    [
        ("cpu:type:x86,ven0000fam0006mod0055:feature:,0000", "x86_64", "real"),
        ("cpu:type:x86,ven0000fam0006mod0055:feature:,0000", "aarch64", "emulated"),
        ("cpu:type:aarch64:feature:,0000", "aarch64", "real"),
        (None, "aarch64", "real"),
    ],
)
def test_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modalias: str | None, machine: str, kind: str
) -> None:
    monkeypatch.delenv("KIRIDASHI_HARDWARE", raising=False)
    if modalias is not None:
        write(tmp_path / "sys/devices/system/cpu/modalias", modalias)
    assert hardware_kind(machine, tmp_path) == kind
    monkeypatch.setenv("KIRIDASHI_HARDWARE", "emulated")
    assert hardware_kind(machine, tmp_path) == "emulated"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_conditions_name_what_slows_a_machine(tmp_path: Path) -> None:
    assert conditions(tmp_path, processors=4) == ()
    write(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n")
    write(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", "50000\n")
    write(tmp_path / "sys/class/thermal/thermal_zone0/temp", "84500\n")
    write(tmp_path / "proc/loadavg", "3.50 1.00 0.50 2/100 999\n")
    assert conditions(tmp_path, processors=4) == ("governor powersave", "throttled 50000", "hot 84 C", "load 3.5")
    write(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", "0\n")
    assert "throttled" not in " ".join(conditions(tmp_path, processors=4))


def test_without_a_memory_controller_resource_limits_are_used(tmp_path: Path) -> None:
    assert open_cage(None, tmp_path).kind == "none"
    assert open_cage(1 << 20, tmp_path).kind == "rlimit"


def test_integer_inputs_and_outputs_use_their_own_scale() -> None:
    details = {"dtype": np.int8, "quantization": (0.5, -3)}
    batch = np.array([[0.0, 1.0, 1.3, 100.0, -100.0]], np.float32)
    quantised = _quantise(batch, details)
    assert quantised.tolist() == [[-3, -1, 0, 127, -128]]
    assert quantised.dtype == np.int8
    assert _dequantise(quantised, details).tolist() == [[0.0, 1.0, 1.5, 65.0, -62.5]]
    assert _quantise(batch, {"dtype": np.float32, "quantization": (0.0, 0)}) is batch


def test_calm_runs_are_taken_as_they_are() -> None:
    times = np.random.default_rng(0).gamma(100, 0.01, 1000)
    settled, notes = settled_runs(times)
    assert settled is times
    assert notes == ()


def test_of_disturbed_runs_the_quietest_window_counts_and_the_note_says_so() -> None:
    times = np.full(1000, 1.0)
    times[:900:10] = 5.0  # every tenth run is interrupted, but for the last window
    settled, notes = settled_runs(times)
    assert np.percentile(settled, (50, 95, 99)).tolist() == [1.0, 1.0, 1.0]
    assert "p95 over all runs 5 ms" in notes[0]


def test_few_runs_are_not_cut_into_windows() -> None:
    times = np.tile([1.0, 1.0, 1.0, 9.0], 20)
    assert settled_runs(times)[0] is times
