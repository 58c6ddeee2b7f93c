"""Which of a bundle's files this device should fetch, try and run. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from kiridashi.budget import Budget, Measurement, Verdict, judge
from kiridashi.errors import KiridashiError, RuntimeUnavailableError
from kiridashi.manifest import Artifact, Manifest
from kiridashi.messages import ArtifactTrial

FLOAT_KINDS = ("onnx-fp32", "tflite-fp32")
POSTPONED = "not measured: files that can be tuned go first"


@dataclass(frozen=True)
class Measured:
    """A candidate with what it was measured to need and what the budget says to that."""

    artifact: str
    measurement: Measurement
    verdict: Verdict


def candidates(manifest: Manifest, runtimes: Collection[str], preferred: str) -> tuple[Artifact, ...]:
    """The inference files that this device can run, in the manifest's order.

    Args:
        manifest: the bundle.
        runtimes: names of the runtimes that are installed.
        preferred: a runtime's name, or ``"auto"`` for any.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    allowed = set(runtimes) if preferred == "auto" else {preferred} & set(runtimes)
    found = tuple(artifact for artifact in manifest.artifacts if artifact.runtime in allowed)
    if not found:
        offered = sorted({artifact.runtime for artifact in manifest.artifacts if artifact.runtime})
        raise RuntimeUnavailableError(
            f"no file of line '{manifest.line}' version {manifest.version} can run on this device",
            why=f"the bundle is for {' and '.join(offered) or 'no runtime'}; installed here: "
            f"{', '.join(sorted(runtimes)) or 'none'}; the configuration asks for '{preferred}'",
            next_step="pip install 'kiridashi[line]' (onnxruntime) or 'kiridashi[litert]' on the device",
        )
    return found


def can_be_tuned(manifest: Manifest, artifact: Artifact) -> bool:
    """Whether tuned values can go into this file: float32 with places for them, or smaller with places for all."""
    if manifest.train is None:
        return False
    if artifact.kind in FLOAT_KINDS:
        return bool(artifact.patches)
    trained = {name for variant in manifest.train.variants for name in variant.parameters}
    return bool(artifact.coded) and {*manifest.train.parameters, *trained} <= artifact.tunable


def needed_files(manifest: Manifest, runnable: Sequence[Artifact], *, tune: bool) -> tuple[Artifact, ...]:
    """What to fetch: what can run here, the probe, the drift reference, and for tuning the train step and its files."""
    names = {artifact.name for artifact in runnable}
    # The closed-form head is fitted on the features that the onnx-fp32 file gives, whatever is deployed.
    kinds = {"probe", "drift-reference"} | ({"train-step", "train-state", "onnx-fp32"} if tune else set())
    return tuple(artifact for artifact in manifest.artifacts if artifact.name in names or artifact.kind in kinds)


def fastest_within(measured: Sequence[Measured]) -> Measured | None:
    """The candidate inside the budget with the lowest 95th percentile, ``None`` if none is inside."""
    inside = [entry for entry in measured if entry.verdict.within]
    return min(inside, key=lambda entry: entry.measurement.latency_p95_ms, default=None)


def nearest(measured: Sequence[Measured]) -> Measured | None:
    """Of candidates over the budget, the one that breaks the fewest limits, then the fastest: the one to report."""
    return min(
        measured, key=lambda entry: (len(entry.verdict.exceeded), entry.measurement.latency_p95_ms), default=None
    )


def explained(
    trials: Sequence[ArtifactTrial],
    measured: Sequence[Measured],
    failures: Mapping[str, KiridashiError],
    budget: Budget,
    best: Measured | None,
) -> tuple[ArtifactTrial, ...]:
    """The trials with what was measured, and for each file why it was chosen or not.

    Args:
        trials: as probing left them; a file that was refused then has its reason already.
        measured: the files that were measured.
        failures: why others could not be.
        budget: the bundle's.
        best: the chosen one.
    """
    by_name = {entry.artifact: entry for entry in measured}
    return tuple(_explained(trial, by_name.get(trial.artifact), failures, budget, best) for trial in trials)


def postponed(trials: Sequence[ArtifactTrial]) -> tuple[str, ...]:
    """The files that passed their checks and were not measured, because others can be tuned."""
    return tuple(trial.artifact for trial in trials if trial.reason == POSTPONED)


def reopened(trials: Sequence[ArtifactTrial]) -> tuple[ArtifactTrial, ...]:
    """The trials without a decision: of the one that was chosen, and of those that were postponed."""
    return tuple(
        msgspec.structs.replace(trial, chosen=False, reason="") if trial.chosen or trial.reason == POSTPONED else trial
        for trial in trials
    )


def given_way(trials: Sequence[ArtifactTrial], artifact: str) -> tuple[ArtifactTrial, ...]:
    """The trials once the chosen file gave way to ``artifact``, because it would have lost too much by the tuning."""
    reasons = {artifact: "the fastest that keeps what was tuned"}
    return tuple(
        msgspec.structs.replace(
            trial,
            chosen=trial.artifact == artifact,
            reason=reasons.get(trial.artifact, "lost too much with tuned weights" if trial.chosen else trial.reason),
        )
        for trial in trials
    )


def _explained(
    trial: ArtifactTrial,
    entry: Measured | None,
    failures: Mapping[str, KiridashiError],
    budget: Budget,
    best: Measured | None,
) -> ArtifactTrial:
    if trial.reason:
        return trial
    if entry is None:
        error = failures.get(trial.artifact)
        reason = f"could not be measured: {error}" if error else POSTPONED
        return msgspec.structs.replace(trial, reason=reason)
    if entry is best:
        reason = "the fastest that passed every gate"
    elif entry.verdict.within and best is not None:
        reason = f"inside the budget, and slower than {best.artifact}"
    else:
        reason = entry.verdict.describe(budget, entry.measurement)
    return msgspec.structs.replace(
        trial,
        chosen=entry is best,
        reason=reason,
        provider=entry.measurement.provider,
        latency_p95_ms=entry.measurement.latency_p95_ms,
        memory_bytes=entry.measurement.memory_bytes,
        within=entry.verdict.within,
    )


def judged(artifact: Artifact, budget: Budget, measurement: Measurement) -> Measured:
    """A candidate's measurement with its verdict."""
    return Measured(artifact.name, measurement, judge(budget, measurement))
