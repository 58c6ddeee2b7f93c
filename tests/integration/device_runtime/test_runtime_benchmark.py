"""The parts of ``benchmarks.runtime`` on the tiny bundle: they measure, and they see what is lost or mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.manifest import Manifest
from kiridashi.slots import LineSlots

from benchmarks.line_bundles import LINE, fill_slots
from benchmarks.line_overhead import median_ci, overhead_us
from benchmarks.line_swaps import _ask, _expected, _frames, swap_under_load

Filled = tuple[LineSlots, Manifest, Manifest]


@pytest.fixture
def filled(bundle: Path, tmp_path: Path) -> Filled:
    return fill_slots(bundle, tmp_path / "state")


@pytest.mark.parametrize("artifact", ["model.onnx", "model.tflite"])
def test_overhead_is_what_a_prediction_takes_beyond_the_bare_call(filled: Filled, artifact: str) -> None:
    slots, first, _ = filled
    rng = np.random.default_rng(0)
    differences = overhead_us(slots, first, artifact, 400, rng)
    low, high = median_ci(differences, rng)
    assert differences.shape == (400,)
    assert low <= np.median(differences) <= high
    assert 0 < np.median(differences) < 500  # a bound on nonsense; the benchmark holds the goal


def test_no_frame_is_lost_while_models_change_over(filled: Filled) -> None:
    slots, first, second = filled
    load, changes = swap_under_load(slots, (first, second), ["model.onnx", "model.tflite"], rate_hz=200, seconds=2)
    assert (load.asked, load.lost) == (400, 0)
    assert len(load.latencies_ms) == sum(load.versions.values()) == 400
    assert changes >= 2
    assert set(load.versions) == {1, 2}


def test_mixed_up_and_refused_frames_are_counted_as_lost(filled: Filled) -> None:
    slots, first, _ = filled
    frames = _frames(first)
    with LineModel(slots) as model:
        expected = _expected(model, frames)
        shifted = _ask(model, frames, [*expected[1:], expected[0]], rate_hz=500, seconds=0.1)
    assert (shifted.asked, shifted.wrong, shifted.lost) == (50, 50, 50)
    closed = _ask(model, frames, expected, rate_hz=500, seconds=0.1)
    assert (closed.asked, closed.refused, closed.lost) == (50, 50, 50)


def test_a_line_process_tells_what_it_holds(filled: Filled) -> None:
    state = filled[0].root.parent.parent
    command = [sys.executable, "-m", "benchmarks.line_child", str(state), LINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert 20 << 20 < row["rss"] <= row["peak"]
    assert row["provider"] == "cpu"
