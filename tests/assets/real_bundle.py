"""A bundle as a plant gets it: EfficientNet-Lite0 at 64 pixels, half of every group, recovered on a shipped task."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.budget import Budget
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.probes import first_units, random_widths
from kiridashi_server.pipeline import BundleSpec, Release, export_bundle
from kiridashi_server.recover.iterations import recover_cut
from kiridashi_server.tasks import Task, load_shipped, shipped_names

PIXELS, SHARE, MULTIPLE, SHOTS = 64, 0.5, 16, 8


def make_real_bundle(folder: Path, line: str, budget: Budget | None = None) -> tuple[Path, Task]:
    """Export version 1 of a line; the bundle's folder, and the task that it was recovered on."""
    backbone = Backbone.load("efficientnet-lite0", image_size=PIXELS)
    task = load_shipped(shipped_names()[0])
    widths = random_widths(backbone.layout, SHARE, 0.0, MULTIPLE, np.random.default_rng(0))
    plan = first_units(backbone.layout, widths)
    few = task.split("train").few_shot(SHOTS, 0)
    recovered = recover_cut(backbone, plan, few, classes=len(task.labels), seed=0)
    spec = BundleSpec(Release(line, 1, task.name, task.labels), budget or Budget())
    export_bundle(recovered.model, backbone, plan, few.images, spec, folder)
    return folder / "bundle", task


def as_version(bundle: Path, version: int) -> tuple[Path, Manifest]:
    """A copy of a bundle that is another version of its line."""
    folder = bundle.with_name(f"{bundle.name}-{version}")
    shutil.copytree(bundle, folder)
    manifest = msgspec.structs.replace(decode_manifest((folder / MANIFEST_NAME).read_bytes()), version=version)
    (folder / MANIFEST_NAME).write_bytes(manifest.encode())
    return folder, manifest
