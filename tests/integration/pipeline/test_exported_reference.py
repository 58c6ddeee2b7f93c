"""A bundle of the pipeline brings the drift reference along, of the float model and of samples that do not repeat."""

from __future__ import annotations

import numpy as np
import torch
from kiridashi.artifacts import read_bundle
from kiridashi.budget import Budget
from kiridashi.drift.rows import decode_reference
from kiridashi.drift.statistics import NAMES, output_statistics
from kiridashi.preprocess import softmax
from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.artifacts import ExportSettings
from kiridashi_server.export.drift_reference import first_of_each
from kiridashi_server.graph.plan import Plan
from kiridashi_server.pipeline import BundleSpec, Release, export_bundle
from tiny_science import SIDE, tiny_samples
from torch import nn


def small_backbone() -> Backbone:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    body = (nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone.from_module(nn.Sequential(*stem, *body).eval(), torch.zeros(1, 3, SIDE, SIDE), name="small")


def test_the_reference_is_signed_for_with_the_bundle(tmp_path) -> None:
    backbone, samples = small_backbone(), tiny_samples(3, seed=1)
    plan = Plan.full(backbone.layout)
    classes = int(samples.labels.max()) + 1
    model = Classifier(backbone.program, nn.Linear(backbone.feature_dim, classes)).eval()
    release = Release("press-3", 1, "hues", tuple(f"c{n}" for n in range(classes)))
    sources = tuple(f"part-{n // 2}" for n in range(len(samples)))
    spec = BundleSpec(
        release,
        Budget(),
        settings=ExportSettings(kinds=("onnx-fp32",), min_top1_agreement=0.0),
        independent=first_of_each(sources),
    )
    done = export_bundle(model, backbone, plan, samples.images, spec, tmp_path)
    manifest = read_bundle(tmp_path / "bundle")
    assert manifest == done.manifest
    artifact = manifest.of_kind("drift-reference")
    assert artifact is not None
    reference = decode_reference((tmp_path / "bundle" / artifact.name).read_bytes(), artifact.name)
    assert reference.names == NAMES
    assert len(reference.rows) == len(set(sources))
    values = softmax(done.result.logits[::2])
    assert [row.best for row in reference.rows] == values.argmax(axis=1).tolist()
    outputs = np.array([row.values[-2:] for row in reference.rows])
    assert np.allclose(outputs, [output_statistics(p) for p in values], rtol=1e-5)
