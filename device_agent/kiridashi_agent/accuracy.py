"""Is a smaller file as good as the float file, here? Judged on the device's labelled hold-out, or on the probe.

With labels, a frame is lost when the float file is right and the smaller one wrong, and won the other way round. More
must be lost than ``max_drop`` allows *and* than chance explains (the exact test of :mod:`kiridashi_agent.gate`) for the
file to be refused. Without labels nobody knows who is right, so every frame with another best class counts as lost; the
file is refused when a file that loses only ``max_drop`` of its frames would seldom differ on so many (exact binomial
test at 5 %). The few frames of a probe find gross faults only: with eight it takes three. A hold-out that shows a loss
but is too small to tell it from chance leaves the verdict to the probe.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from kiridashi.artifacts import check_file
from kiridashi.errors import BundleError, InputError, StateError
from kiridashi.gathering import Sources, gather
from kiridashi.kept import KeptSamples
from kiridashi.manifest import Artifact, Manifest
from kiridashi.messages import AccuracyCheck
from kiridashi.preprocess import to_input
from kiridashi.runtime import open_model, runnable
from kiridashi.samples import Samples
from kiridashi.spool import SpoolFolder
from numpy.typing import NDArray

from kiridashi_agent.choice import FLOAT_KINDS
from kiridashi_agent.gate import SIGNIFICANCE, chance_of_loss
from kiridashi_agent.jobs import AccuracyRequest
from kiridashi_agent.probe import known_outputs, read_manifest

Request = AccuracyRequest


def run(request: AccuracyRequest) -> AccuracyCheck:
    """Compare one artifact with the float file; see :func:`kiridashi_agent.jobs.check_accuracy` for what is raised."""
    folder = Path(request.folder)
    manifest = read_manifest(folder)
    artifact = manifest.artifact(request.artifact)
    reference = _reference(manifest, artifact, folder)
    held, why = _hold_out(request, manifest)
    if held is not None and reference in runnable((reference,)) and (folder / reference.name).is_file():
        before = _classes(request, manifest, reference, held.images)
        after = _classes(request, manifest, artifact, held.images)
        check = judge_labelled(held.labels, before, after, reference.name, request.max_drop)
        if not check.passed or check.drop <= request.max_drop:
            return check
        why = f"the hold-out is too small: {check.reason}"
    elif held is not None:
        why = f"{reference.name} cannot run here"
    frames, expected = known_outputs(folder, manifest, reference)
    after = _classes(request, manifest, artifact, frames)
    return judge_agreement(expected.argmax(axis=1), after, reference.name, request.max_drop, why)


def judge_labelled(
    labels: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    reference: str,
    max_drop: float,
) -> AccuracyCheck:
    """The verdict on a hold-out. Pure.

    Args:
        labels: true classes, int64 [n], n >= 1.
        before: classes predicted by the float file.
        after: classes predicted by the smaller file.
        reference: the float file's name.
        max_drop: a share of 1.
    """
    lost = int(((before == labels) & (after != labels)).sum())
    won = int(((before != labels) & (after == labels)).sum())
    drop, chance = (lost - won) / len(labels), chance_of_loss(lost, won)
    passed = drop <= max_drop or chance >= SIGNIFICANCE
    reason = (
        f"{(after == labels).mean():.1%} of {len(labels)} hold-out frames right, {reference} "
        f"{(before == labels).mean():.1%}; {max_drop:.1%} may be lost"
    )
    if drop > max_drop:
        reason += f", and chance {'explains' if passed else 'does not explain'} more (p = {chance:.2g})"
    return AccuracyCheck("holdout", len(labels), reference, drop, max_drop, passed, reason)


def judge_agreement(
    before: NDArray[np.int64], after: NDArray[np.int64], reference: str, max_drop: float, why: str
) -> AccuracyCheck:
    """The verdict on frames without labels. Pure; ``why`` says why no hold-out decides, the rest is as above."""
    different, frames = int((before != after).sum()), len(before)
    chance = chance_of_more(different, frames, max_drop)
    passed = different <= max_drop * frames or chance >= SIGNIFICANCE
    reason = (
        f"another best class than {reference} on {different} of {frames} probe frames ({why}); "
        f"{max_drop:.1%} may differ"
    )
    if different > max_drop * frames:
        reason += f", and chance {'explains' if passed else 'does not explain'} more (p = {chance:.2g})"
    return AccuracyCheck("probe", frames, reference, different / frames, max_drop, passed, reason)


def chance_of_more(different: int, frames: int, share: float) -> float:
    """Probability that at least ``different`` of ``frames`` differ when each does with probability ``share``."""
    terms = (math.comb(frames, k) * share**k * (1 - share) ** (frames - k) for k in range(different, frames + 1))
    return min(1.0, sum(terms))


def _reference(manifest: Manifest, artifact: Artifact, folder: Path) -> Artifact:
    """The float file to compare with: of the same runtime if there is one, and one that was fetched rather than not."""
    floats = [entry for entry in manifest.artifacts if entry.kind in FLOAT_KINDS]
    if not floats:
        raise BundleError(
            f"the bundle of line '{manifest.line}' has no float file to compare '{artifact.name}' with",
            next_step="export it with one",
        )
    return min(floats, key=lambda entry: (not (folder / entry.name).is_file(), entry.runtime != artifact.runtime))


def _hold_out(request: AccuracyRequest, manifest: Manifest) -> tuple[Samples | None, str]:
    """The labelled hold-out, or why there is none."""
    size, state = manifest.preprocessing, Path(request.state_dir)
    sources = Sources(
        folder=Path(request.samples) if request.samples else None,
        spool=SpoolFolder(state, request.line),
        kept=KeptSamples(state, request.line),
    )
    try:
        held = gather(sources, manifest.labels, size.height, size.width).samples.part(holdout=True)
    except (InputError, StateError) as error:
        return None, f"no hold-out: {error.what}"
    return (held, "") if len(held) else (None, "no hold-out on this device")


def _classes(
    request: AccuracyRequest, manifest: Manifest, artifact: Artifact, images: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """The best classes [n], frame by frame as on the line."""
    path = Path(request.folder) / artifact.name
    check_file(path, artifact)
    model = open_model(path, artifact, request.threads, manifest.artifacts, request.providers)
    batches = (to_input(image[None], manifest.preprocessing, model.layout) for image in images)
    return np.array([int(model.run(batch)[0].argmax()) for batch in batches], np.int64)
