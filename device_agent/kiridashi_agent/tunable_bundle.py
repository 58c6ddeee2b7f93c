"""The bundle in a slot as a tuning needs it: checked, with the parameters as they were shipped."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kiridashi.artifacts import check_file
from kiridashi.errors import BundleError, StateError
from kiridashi.manifest import Artifact, Manifest, TrainSpec
from kiridashi.runtime.protocol import FloatArray
from kiridashi.slots import TUNED_NAME, TUNING_NAME, LineSlots

from kiridashi_agent.choice import FLOAT_KINDS
from kiridashi_agent.jobs import TRYING_NAME, TuneRequest
from kiridashi_agent.patching import read_parameters
from kiridashi_agent.probe import read_manifest
from kiridashi_agent.tuned_files import check_places
from kiridashi_agent.variants import variants_of


@dataclass(frozen=True)
class TunableBundle:
    """The slot's bundle, checked.

    ``deployed`` is the file that would run untuned, ``target`` the float32 file that tuning writes, ``features`` the
    one whose features the head is fitted on, ``start`` the parameters as shipped.
    """

    folder: Path
    manifest: Manifest
    spec: TrainSpec
    deployed: Artifact
    target: Artifact
    features: Artifact
    start: dict[str, FloatArray]


def clear(slots: LineSlots, request: TuneRequest) -> None:
    """Remove what an earlier attempt left, unless it is what serves now.

    Raises:
        StateError: the slot is empty, or its tuned files are in use.
    """
    folder = slots.folder(request.slot)
    if not folder.is_dir():
        raise StateError(f"line '{request.line}' has nothing in slot {request.slot} to tune")
    for active in (slots.active(), slots.previous()):
        if active is not None and active.tuned and active.slot == request.slot:
            raise StateError(
                f"the tuned files in slot {request.slot} of line '{request.line}' are in use",
                next_step="prepare the other slot with the bundle, and tune there",
            )
    (folder / TRYING_NAME).unlink(missing_ok=True)
    for name in (TUNING_NAME, TUNED_NAME):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def open_bundle(slots: LineSlots, request: TuneRequest) -> TunableBundle:
    """Read the slot's bundle, and check every file that a tuning uses.

    Raises:
        BundleError: it cannot be tuned, or a file is not the manifest's.
    """
    folder = slots.folder(request.slot)
    manifest = read_manifest(folder)
    spec = manifest.train
    if spec is None:
        raise BundleError(f"the bundle in {folder} has no train step", next_step="export it with one")
    deployed = manifest.artifact(request.artifact)
    target = _target(manifest, spec, deployed)
    features = manifest.of_kind("onnx-fp32")
    if features is None:
        raise BundleError(f"the bundle in {folder} has no onnx-fp32 file, whose features the head is fitted on")
    graphs = {variant.graph for variant in variants_of(spec)}
    for name in {deployed.name, target.name, features.name, spec.state} | graphs:
        check_file(folder / name, manifest.artifact(name))
    needed = {name for variant in variants_of(spec) for name in variant.parameters}
    start = read_parameters(folder / features.name, [one for one in features.patches if one.parameter in needed])
    with np.load(folder / spec.state, allow_pickle=False) as file:
        start |= {name: np.asarray(file[name], np.float32) for name in spec.parameters if name in file.files}
    if not needed <= set(start):
        raise BundleError(f"{folder / spec.state} lacks parameters that the manifest lists")
    check_places(folder / target.name, target, start)
    return TunableBundle(folder, manifest, spec, deployed, target, features, start)


def _target(manifest: Manifest, spec: TrainSpec, deployed: Artifact) -> Artifact:
    """The float32 file that tuning writes: the deployed one, or where it is smaller its sibling of the same runtime."""
    needed = {spec.head_weight, spec.head_bias}
    siblings = [artifact for artifact in manifest.artifacts if artifact.runtime == deployed.runtime]
    first = [artifact for artifact in siblings if artifact.kind in FLOAT_KINDS] if deployed.coded else []
    for artifact in (*first, deployed, *siblings):
        if needed <= {patch.parameter for patch in artifact.patches}:
            return artifact
    raise BundleError(
        f"no file of the bundle for {deployed.runtime} can take a tuned head",
        next_step="export the bundle again with a float32 file for this runtime",
    )
