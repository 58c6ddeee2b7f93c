"""Probing: do known frames give the known logits on this hardware and runtime?

The rule, with ``scale = max(1, largest absolute expected logit)``:

* float32: every logit within ``1e-3 · scale``; kernels differ in the order of additions only.
* float16 weights: within ``2e-2 · scale``; some processors also calculate in float16.
* int8: at least three quarters of the frames have the same best class, and every logit is within ``0.25 · scale``.
  Integer kernels round differently from processor to processor, and those without dot-product instructions saturate;
  a runtime that is silently wrong (it happens with dynamic int8) is far outside.

A model that fails is refused: it would not do on the line what was validated on the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kiridashi.artifacts import MANIFEST_NAME, check_file
from kiridashi.errors import BundleError
from kiridashi.manifest import Artifact, Manifest, decode_manifest
from kiridashi.preprocess import as_frames, to_input
from kiridashi.runtime import open_model
from kiridashi.runtime.protocol import FloatArray
from numpy.typing import NDArray

from kiridashi_agent.jobs import ProbeReport, ProbeRequest

Request = ProbeRequest


@dataclass(frozen=True)
class Rule:
    """Bounds for one number format: the difference relative to the logits' scale, and agreement of the best class."""

    difference: float
    agreement: float


RULES = {"fp32": Rule(1e-3, 0.0), "fp16": Rule(2e-2, 0.0), "int8": Rule(0.25, 0.75)}


def run(request: ProbeRequest) -> ProbeReport:
    """Probe one artifact of a bundle folder.

    Raises:
        BundleError: a damaged file, no probe for this artifact, or outputs outside the rule.
        RuntimeUnavailableError: the runtime is not installed.
    """
    folder = Path(request.folder)
    manifest = read_manifest(folder)
    artifact = manifest.artifact(request.artifact)
    check_file(folder / artifact.name, artifact)
    frames, expected = known_outputs(folder, manifest, artifact)
    model = open_model(folder / artifact.name, artifact, request.threads, manifest.artifacts, request.providers)
    batch = to_input(frames, manifest.preprocessing, model.layout)
    got = np.concatenate([model.run(batch[n : n + 1]) for n in range(len(batch))])
    return compare(artifact, expected, got, model.runtime)


def compare(artifact: Artifact, expected: FloatArray, got: FloatArray, runtime: str) -> ProbeReport:
    """Apply the rule to logits [N, classes].

    Raises:
        BundleError: they are outside it; says by how much.
    """
    rule = RULES[artifact.kind.rpartition("-")[2]]
    if got.shape != expected.shape:
        raise BundleError(f"'{artifact.name}' gives logits {list(got.shape)}, the probe has {list(expected.shape)}")
    report = ProbeReport(
        artifact=artifact.name,
        images=len(expected),
        max_abs_diff=float(np.abs(got - expected).max()),
        tolerance=rule.difference * max(1.0, float(np.abs(expected).max())),
        top1_agreement=float((got.argmax(1) == expected.argmax(1)).mean()),
    )
    # "not <=" rather than ">": a difference that is not a number must not pass.
    if not report.max_abs_diff <= report.tolerance or report.top1_agreement < rule.agreement:
        raise BundleError(
            f"'{artifact.name}' gives other outputs here than where it was made",
            why=f"with {runtime}, logits differ by up to {report.max_abs_diff:.3g} (allowed {report.tolerance:.3g}) "
            f"and {report.top1_agreement:.0%} of {report.images} frames get the same best class",
            next_step="use another artifact or runtime version on this device",
        )
    return report


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder, without hashing the files it lists.

    Raises:
        BundleError: there is none, or it is malformed.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle", why=f"it has no {MANIFEST_NAME}")
    return decode_manifest(path.read_bytes(), str(path))


def known_outputs(folder: Path, manifest: Manifest, artifact: Artifact) -> tuple[NDArray[np.uint8], FloatArray]:
    """The bundle's known frames, uint8 [N, H, W, 3], and an artifact's logits of them [N, classes].

    Raises:
        BundleError: the bundle has no probe, or none for this artifact, or it is damaged.
    """
    entry = manifest.of_kind("probe")
    if entry is None:
        raise BundleError(f"the bundle in {folder} has no probe", next_step="export the bundle again")
    path = folder / entry.name
    check_file(path, entry)
    key = f"logits.{artifact.name}"
    with np.load(path, allow_pickle=False) as file:
        if not {"images", key} <= set(file.files):
            raise BundleError(f"{path} has no outputs for '{artifact.name}'")
        return as_frames(file["images"]), np.asarray(file[key], np.float32)
