"""Predict, measure, correct once: the loop between the solver and a device, with a device whose truth we choose."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from kiridashi.budget import Budget, Measurement
from kiridashi.errors import BudgetError
from kiridashi.probes import ProbeReport, Timing
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget import Profile
from kiridashi_server.budget.probes import read_probe_set
from kiridashi_server.pipeline import fit_to_budget, profile_backbone
from torch import nn

SLOWER_THAN_PROFILED = 1.5
_EMPTY_FILE = 3_000


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(128, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Backbone.from_module(module, torch.zeros(1, 3, 16, 16), name="tiny")


@pytest.fixture(scope="module")
def scores(backbone: Backbone) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {group.name: rng.gamma(1.0, size=group.size).astype(np.float32) for group in backbone.layout.groups}


class Device:
    """Needs time in proportion to a cut's parameters; ``factor`` makes it slower than it was."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.sizes: list[int] = []

    def __call__(self, files: Sequence[Path]) -> tuple[Measurement, ...]:
        return tuple(self._measure(file) for file in files)

    def profile(self, folder: Path) -> ProbeReport:
        """What the device's agent would report of a probe set."""
        probes = read_probe_set(folder)
        timings = []
        for graph in probes.graphs:
            one = self._measure(folder / graph.artifact.name)
            quiet = one.latency_p50_ms
            timings.append(
                Timing(
                    name=graph.artifact.name,
                    quiet_ms=quiet,
                    halves_ms=(quiet, quiet),
                    anchor_ms=quiet,
                    runs=one.runs,
                    p50_ms=one.latency_p50_ms,
                    p95_ms=one.latency_p95_ms,
                    memory_bytes=one.memory_bytes,
                    load_ms=one.load_ms,
                )
            )
        return ProbeReport(
            probes=probes.digest,
            device_class="bench",
            runtime="onnxruntime 1",
            threads=1,
            hardware="real",
            timings=tuple(timings),
            seconds=1.0,
            complete=True,
        )

    def _measure(self, file: Path) -> Measurement:
        size = file.stat().st_size
        self.sizes.append(size)
        latency = self.factor * (size - _EMPTY_FILE) / 1e5
        return Measurement(
            memory_bytes=50_000_000 + size,
            file_bytes=size,
            latency_p50_ms=latency,
            latency_p95_ms=latency * 1.1,
            latency_p99_ms=latency * 1.2,
            load_ms=1.0,
            runs=100,
            runtime="onnxruntime",
            threads=1,
            hardware="real",
        )


@pytest.fixture(scope="module")
def profile(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile_backbone(backbone, tmp_path_factory.mktemp("profile"), measure=Device().profile)


@pytest.fixture(scope="module")
def budget(profile: Profile) -> Budget:
    return Budget(latency_p95_ms=0.5 * profile.dense.latency_p95_ms)


def test_a_device_as_it_was_profiled_needs_no_correction(
    backbone: Backbone, scores: dict[str, np.ndarray], profile: Profile, budget: Budget, tmp_path: Path
) -> None:
    fitted = fit_to_budget(backbone, scores, budget, profile, tmp_path, measure=Device())
    assert fitted.corrections == 0
    assert budget.latency_p95_ms is not None
    assert 0.7 * budget.latency_p95_ms <= fitted.measured.latency_p95_ms <= budget.latency_p95_ms


def test_a_slower_device_is_cut_again_once_and_kept(
    backbone: Backbone, scores: dict[str, np.ndarray], profile: Profile, budget: Budget, tmp_path: Path
) -> None:
    device = Device(SLOWER_THAN_PROFILED)
    fitted = fit_to_budget(backbone, scores, budget, profile, tmp_path, measure=device)
    assert fitted.corrections == 1
    assert device.sizes[-1] < device.sizes[0]
    assert budget.latency_p95_ms is not None
    assert fitted.measured.latency_p95_ms <= budget.latency_p95_ms


def test_a_device_that_gets_slower_all_the_time_is_given_up(
    backbone: Backbone, scores: dict[str, np.ndarray], profile: Profile, budget: Budget, tmp_path: Path
) -> None:
    device = Device(SLOWER_THAN_PROFILED)

    def slower(files: Sequence[Path]) -> tuple[Measurement, ...]:
        device.factor *= 2
        return device(files)

    with pytest.raises(BudgetError, match="over the budget") as caught:
        fit_to_budget(backbone, scores, budget, profile, tmp_path, measure=slower)
    assert "solved twice" in caught.value.why
    assert len(device.sizes) == 2
