"""A cut for a device that is not this machine: the profile foretells it, nothing is measured here."""

from pathlib import Path

import numpy as np
import pytest
from kiridashi.budget import Budget
from kiridashi_server import cut_run
from kiridashi_server.backbone import Backbone
from kiridashi_server.cut_run import Composed, CutRequest, CutRun
from kiridashi_server.pipeline import Release
from kiridashi_server.stages import Workspace
from tiny_science import made_up_profile, tiny_samples


def test_nothing_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.load(image_size=32)
    rng = np.random.default_rng(0)
    scores = {name: rng.gamma(1.0, size=size).tolist() for name, size in backbone.layout.sizes.items()}
    profile = made_up_profile(backbone)
    samples = tiny_samples(4, 0)
    request = CutRequest(
        backbone=backbone,
        records=(),
        samples=samples,
        calibration=samples,
        release=Release("line", 1, "hues", ("red", "green", "blue")),
        budget=Budget(file_bytes=6_000_000, latency_p95_ms=0.2),
        profile=profile,
    )
    run = CutRun(request, Workspace(tmp_path))
    monkeypatch.setattr(CutRun, "composed", Composed("uniform", "reuse", "", (), scores))
    monkeypatch.setattr(cut_run, "fit_to_budget", lambda *_: pytest.fail("it was measured on this machine"))
    planned = run.planned
    assert planned.measured is None
    assert planned.forecast.file_bytes <= 6_000_000
    assert 0.17 < planned.forecast.latency_p95_ms <= 0.95 * 0.2
