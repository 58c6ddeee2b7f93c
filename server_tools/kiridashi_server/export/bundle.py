"""A bundle folder: artifacts, probe and manifest, complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import MANIFEST_NAME, check_file, describe_file, sync_folder, write_atomic
from kiridashi.errors import BundleError
from kiridashi.manifest import Artifact, Manifest, decode_manifest
from numpy.typing import NDArray

from kiridashi_server.export.npz import deterministic_npz

PROBE_NAME = "probe.npz"


@dataclass(frozen=True)
class BundleFile:
    """A file to put into a bundle, with its manifest entry; the entry's name is the file's name there."""

    path: Path
    artifact: Artifact


@dataclass(frozen=True)
class Probe:
    """Known inputs and outputs, by which a device checks itself before anything else.

    Attributes:
        images: uint8 [n, H, W, 3], RGB.
        logits: for every inference artifact, by file name, what its runtime gave here: float32 [n, classes].
    """

    images: NDArray[np.uint8]
    logits: Mapping[str, NDArray[np.float32]]


def write_bundle(folder: Path, draft: Manifest, files: Sequence[BundleFile], probe: Probe) -> Manifest:
    """Write a bundle: all files, the probe, and the manifest last; then it appears under its name at once.

    Args:
        folder: the bundle's folder; must not exist. Until the end the work is in a hidden sibling of it.
        draft: the manifest without artifacts.
        files: the artifacts; each must be what its entry says.
        probe: goes into ``probe.npz``, with the keys ``images`` and ``logits.<artifact name>``.

    Returns:
        The manifest as written. The same input gives the same bytes.

    Raises:
        BundleError: the folder exists, an inference artifact has no probe outputs or the other way round,
            a file is not what its entry says, or the manifest would not be accepted by a device.
    """
    if folder.exists():
        raise BundleError(f"{folder} is there already", next_step="choose another folder, or remove this one")
    expected = {file.artifact.name for file in files if file.artifact.runtime is not None}
    if expected != set(probe.logits):
        raise BundleError(f"the probe has outputs of {sorted(probe.logits)}, the bundle runs {sorted(expected)}")
    for file in files:
        check_file(file.path, file.artifact)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # left by a run that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        manifest = _fill(partial, draft, files, probe)
        os.rename(partial, folder)  # noqa: PTH104 (must fail on a folder that is not empty)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return manifest


def _fill(folder: Path, draft: Manifest, files: Sequence[BundleFile], probe: Probe) -> Manifest:
    for file in files:
        write_atomic(folder / file.artifact.name, file.path.read_bytes())
    arrays = {f"logits.{name}": values.astype(np.float32) for name, values in probe.logits.items()}
    deterministic_npz(folder / PROBE_NAME, {"images": probe.images, **arrays})
    artifacts = (*(file.artifact for file in files), describe_file(folder / PROBE_NAME, "probe"))
    manifest = msgspec.structs.replace(draft, artifacts=artifacts)
    encoded = manifest.encode()
    decode_manifest(encoded)  # what a device would refuse is not written
    write_atomic(folder / MANIFEST_NAME, encoded)
    return manifest
