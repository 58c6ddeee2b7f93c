"""The tuned values in every file of the bundle that can take them: float32 ones by their bytes, smaller ones anew.

What a smaller file lost by being made anew is not known before it has predicted: it is judged on the hold-out by what
the line allows of any smaller file, and if it lost more, it is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from kiridashi.artifacts import check_file, write_atomic
from kiridashi.errors import BundleError
from kiridashi.manifest import Artifact, Manifest
from kiridashi.recode import recode
from kiridashi.runtime import runnable
from kiridashi.runtime.protocol import FloatArray
from numpy.typing import NDArray

from kiridashi_agent.accuracy import judge_labelled
from kiridashi_agent.patching import patch_artifact, read_parameters

Predict = Callable[[Artifact, Path], NDArray[np.int64]]


@dataclass
class TunedFiles:
    """What became of the files: ``fresh`` are smaller ones with the tuned values, each with its predictions of the
    hold-out; ``stale`` are those without them, by name with the reason."""

    fresh: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TunedValues:
    """What tuning came to: all values, those that changed, and how the tuned ``target`` predicts the hold-out."""

    values: Mapping[str, FloatArray]
    changed: frozenset[str]
    start: Mapping[str, FloatArray]
    target: str
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]


def write_others(
    folder: Path, part: Path, manifest: Manifest, tuned: TunedValues, predict: Predict, max_drop: float
) -> TunedFiles:
    """Write the values into every inference file of ``folder`` but the target, into ``part``.

    Args:
        folder: the bundle.
        part: where tuned files go.
        manifest: the bundle's.
        tuned: the values.
        predict: predicts the hold-out with a file of a folder.
        max_drop: the share of frames that a smaller file may lose against the target.

    Raises:
        BundleError: a file is not the manifest's, or a place does not hold its parameter.
    """
    found = TunedFiles()
    for artifact in manifest.artifacts:
        source = folder / artifact.name
        if artifact.runtime is None or artifact.name == tuned.target:
            continue
        lacking = tuned.changed - artifact.tunable
        if not source.is_file():
            found.stale[artifact.name] = "it is not on this device"
        elif lacking or not artifact.tunable:
            found.stale[artifact.name] = f"it has no place for {min(lacking, default='a parameter')}"
        else:
            _write(source, part / artifact.name, artifact, tuned)
            if artifact.coded:
                _judge(found, artifact, part, tuned, predict, max_drop)
    return found


def _write(source: Path, destination: Path, artifact: Artifact, tuned: TunedValues) -> None:
    check_file(source, artifact)
    check_places(source, artifact, tuned.start)
    places = [patch for patch in artifact.patches if patch.parameter in tuned.values]
    patch_artifact(source, places, tuned.values, destination)
    if artifact.coded:
        changed = {name: tuned.values[name] for name in tuned.changed}
        codes = recode(destination.read_bytes(), artifact.coded, changed, artifact.name)
        write_atomic(destination, codes)


def _judge(
    found: TunedFiles, artifact: Artifact, part: Path, tuned: TunedValues, predict: Predict, max_drop: float
) -> None:
    if not runnable((artifact,)):
        reason = "its runtime is not installed, so it could not be judged"
    else:
        after = predict(artifact, part)
        check = judge_labelled(tuned.labels, tuned.predicted, after, tuned.target, max_drop)
        reason = "" if check.passed else check.reason
        if check.passed:
            found.fresh[artifact.name] = after
    if reason:
        found.stale[artifact.name] = reason
        (part / artifact.name).unlink()


def check_places(path: Path, artifact: Artifact, start: Mapping[str, FloatArray]) -> None:
    """Check that a file holds the shipped values where the manifest says.

    Raises:
        BundleError: it does not.
    """
    for name, held in read_parameters(path, artifact.patches).items():
        if name in start and not np.array_equal(held.ravel(), start[name].ravel()):
            raise BundleError(f"the manifest's place of '{name}' in {path.name} does not hold its values")
