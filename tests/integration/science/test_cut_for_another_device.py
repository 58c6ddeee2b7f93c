"""A cut for a device that is not this machine: the profile foretells it, nothing is measured here."""

from pathlib import Path

import numpy as np
import pytest
from kiridashi.budget import Budget
from kiridashi_server import cut_run
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget import Profile
from kiridashi_server.cut_run import Composed, CutRequest, CutRun
from kiridashi_server.pipeline import Release
from kiridashi_server.stages import Workspace
from tiny_science import tiny_samples


def test_nothing_is_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.load(image_size=32)
    rng = np.random.default_rng(0)
    scores = {name: rng.gamma(1.0, size=size).tolist() for name, size in backbone.layout.sizes.items()}
    profile = Profile(
        device_class="far-away",
        hardware="real",
        runtime_name="onnxruntime",
        runtime="onnxruntime 1",
        threads=1,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        macs=backbone.costs.macs({}),
        points=(),
        block=8,
        multiple=8,
        block_errors={},
        cliffs={},
        memory={"fixed": 50e6, "parameters": 8.0},
        file={"fixed": 2_000.0, "parameters": 4.0},
        latency={"fixed": 0.01, "weights": 1e-7, "dense": 1e-8},
        tail=1.2,
        noise=0.0,
        error={"memory": 0.0, "file": 0.0, "latency": 0.05},
    )
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
