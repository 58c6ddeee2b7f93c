"""Bundles of a real cut, in the slots of a line: EfficientNet-Lite0, half of every group, one version in each slot."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from kiridashi.artifacts import MANIFEST_NAME, check_file, write_atomic
from kiridashi.budget import Budget
from kiridashi.manifest import ArtifactKind, Manifest, Preprocessing, decode_manifest
from kiridashi.slots import Active, LineSlots
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.probes import first_units, random_widths
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.artifacts import ExportSettings, export_artifacts
from kiridashi_server.export.bundle import write_bundle
from kiridashi_server.graph import cut
from kiridashi_server.graph.fold import fold_batch_norm
from torch import nn

LINE = "press-3"
LABELS = tuple(f"class-{number}" for number in range(8))
_SHARE, _MULTIPLE, _IMAGES = 0.5, 16, 8


def make_line_bundle(pixels: int, kinds: Sequence[ArtifactKind], folder: Path, seed: int) -> Manifest:
    """The cut as a bundle in ``folder``, with a random head: what it says means nothing, what it costs is real.

    A bundle that an earlier run left there is used again if all its files are whole.
    """
    if (folder / MANIFEST_NAME).is_file():
        manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
        for artifact in manifest.artifacts:
            check_file(folder / artifact.name, artifact)
        return manifest
    backbone = Backbone.load("efficientnet-lite0", image_size=pixels)
    rng = np.random.default_rng(seed)
    plan = first_units(backbone.layout, random_widths(backbone.layout, _SHARE, 0.0, _MULTIPLE, rng))
    small = fold_batch_norm(cut(backbone.program, backbone.tracking, plan))
    example = torch.zeros(1, *backbone.input_size)
    with torch.no_grad():
        head = nn.Linear(int(small(example).shape[1]), len(LABELS))
        head.weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    mean, std = (tuple(map(float, values)) for values in (backbone.mean, backbone.std))
    preprocessing = Preprocessing(pixels, pixels, mean, std)
    images = rng.integers(0, 256, (_IMAGES, pixels, pixels, 3), dtype=np.uint8)
    made = export_artifacts(
        Classifier(small, head).eval(),
        example,
        images,
        preprocessing,
        {},
        folder.with_name(f"{folder.name}-files"),
        ExportSettings(kinds=tuple(kinds), min_top1_agreement=0.0),
    )
    draft = Manifest(
        line=LINE,
        version=1,
        task="random",
        labels=LABELS,
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        plan_digest="none",
        parameters_dense=backbone.costs.parameters({}),
        parameters_kept=backbone.costs.parameters(plan.counts),
        preprocessing=preprocessing,
        budget=Budget(),
        artifacts=(),
    )
    return write_bundle(folder, draft, made.files, made.probe)


def fill_slots(bundle: Path, state: Path) -> tuple[LineSlots, Manifest, Manifest]:
    """A fresh state folder with version 1 in slot a, active, and the same files as version 2 in slot b."""
    shutil.rmtree(state, ignore_errors=True)
    slots = LineSlots(state, LINE)
    first = decode_manifest((bundle / MANIFEST_NAME).read_bytes())
    second = msgspec.structs.replace(first, version=first.version + 1)
    for slot, manifest in (("a", first), ("b", second)):
        folder = slots.prepare("a" if slot == "a" else "b")
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        write_atomic(folder / MANIFEST_NAME, manifest.encode())
    slots.activate(Active(slot="a", artifact=first_runnable(first), model_digest=first.digest))
    return slots, first, second


def first_runnable(manifest: Manifest) -> str:
    """The name of the first file that can predict."""
    return next(artifact.name for artifact in manifest.artifacts if artifact.runtime)
