"""Loading what a line's pointer names: checked, warmed up, ready to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kiridashi.artifacts import MANIFEST_NAME, check_file
from kiridashi.errors import BundleError, KiridashiError, StateError, TrustError
from kiridashi.manifest import Artifact, Manifest, decode_manifest
from kiridashi.prediction import Prediction
from kiridashi.preprocess import model_input, softmax
from kiridashi.runtime import open_model
from kiridashi.runtime.protocol import PREFERENCE, Layout, LoadedModel, Provider
from kiridashi.slots import TUNED_NAME, Active, LineSlots
from kiridashi.trust import check_tuned, load_public_key

Frames: TypeAlias = "NDArray[np.uint8] | Sequence[NDArray[np.uint8]]"
Stamp: TypeAlias = tuple[int, int, int]
WARM_UP_RUNS = 3
_LOAD_ATTEMPTS = 3
_GREY = 128


@dataclass(frozen=True)
class LineInfo:
    """What a line's open model is and what computes it.

    Attributes:
        line, version, task: of the bundle.
        model_digest: as predictions have it.
        tuned: whether these are the weights that the device tuned.
        artifact, kind: the file and its kind, such as ``"onnx-fp32"``.
        runtime: name and version of the library.
        provider: what computes the model: "tensorrt", "cuda", "xnnpack" or "cpu".
        threads: inside one prediction.
        layout: the order of axes of the model's input.
        height, width: of the model's input, pixels.
        swap_error: why a newer model is not used; empty if there is none.
    """

    line: str
    version: int
    task: str
    model_digest: str
    tuned: bool
    artifact: str
    kind: str
    runtime: str
    provider: Provider
    threads: int
    layout: Layout
    height: int
    width: int
    swap_error: str


@dataclass(frozen=True, slots=True)
class Serving:
    """A loaded model with what is needed to use it. May be used from several threads."""

    active: Active
    manifest: Manifest
    artifact: Artifact
    model: LoadedModel
    threads: int

    def predict(self, frames: Frames) -> Prediction:
        """Predict a frame uint8 [H, W, 3], a batch [N, H, W, 3] or a list of frames.

        Raises:
            InputError: not such frames.
            BundleError: the runtime fails.
        """
        manifest = self.manifest
        values = softmax(self.model.run(model_input(frames, manifest.preprocessing, self.model.layout)))
        one = isinstance(frames, np.ndarray) and frames.ndim == 3
        return Prediction(
            values[0] if one else values, manifest.labels, self.active.model_digest, self.manifest.version
        )

    def info(self, line: str, swap_error: KiridashiError | None) -> LineInfo:
        """This model as :class:`LineInfo` has it."""
        size = self.manifest.preprocessing
        return LineInfo(
            line=line,
            version=self.manifest.version,
            task=self.manifest.task,
            model_digest=self.active.model_digest,
            tuned=self.active.tuned,
            artifact=self.artifact.name,
            kind=self.artifact.kind,
            runtime=self.model.runtime,
            provider=self.model.provider,
            threads=self.threads,
            layout=self.model.layout,
            height=size.height,
            width=size.width,
            swap_error="" if swap_error is None else str(swap_error),
        )

    def warm_up(self) -> None:
        """Predict a grey frame a few times, so that no frame of the line waits for what a runtime does only once.

        Raises:
            BundleError: the model does not give one value for each label, or cannot run.
        """
        size = self.manifest.preprocessing
        grey = np.full((size.height, size.width, 3), _GREY, np.uint8)
        for _ in range(WARM_UP_RUNS):
            values = self.predict(grey).values
            if values.shape != (len(self.manifest.labels),):
                raise BundleError(
                    f"'{self.artifact.name}' gives {list(values.shape)} values for one frame",
                    why=f"the manifest has {len(self.manifest.labels)} labels",
                    next_step="export the bundle again",
                )


def load_active(
    slots: LineSlots, threads: int | None, providers: Sequence[Provider] | None, attempts: int = _LOAD_ATTEMPTS
) -> Serving:
    """Load what the pointer names; if the pointer is replaced meanwhile, a failure is the old one's: try again.

    ``threads`` and ``providers`` that are ``None`` are those of the pointer: what the agent measured.

    Raises:
        StateError: no model is active, the state folder is damaged, or memory is short.
        BundleError, TrustError: a file is not what its manifest or seal says, or the model cannot run.
        RuntimeUnavailableError: the runtime is not installed, or none of ``providers`` is here.
    """
    seen = stamp(slots.pointer_path)
    try:
        return _load_once(slots, threads, providers)
    except (KiridashiError, OSError, MemoryError) as error:
        if attempts > 1 and stamp(slots.pointer_path) != seen:
            return load_active(slots, threads, providers, attempts - 1)
        if isinstance(error, KiridashiError):
            raise
        why = str(error) or type(error).__name__
        raise StateError(f"the model of line '{slots.line}' cannot be read", why=why) from error


def _load_once(slots: LineSlots, threads: int | None, providers: Sequence[Provider] | None) -> Serving:
    active = slots.served()
    threads = threads or active.threads or 1
    providers = providers or active.providers or PREFERENCE
    folder = slots.folder(active.slot)
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))
    artifact = manifest.artifact(active.artifact)
    path = slots.model_path(active)
    if active.tuned:
        key = load_public_key(slots.root.parent.parent)
        check_tuned(folder / TUNED_NAME, artifact.name, manifest.digest, active.model_digest, key)
    elif manifest.digest != active.model_digest:
        raise TrustError(f"the manifest in {folder} is not the one that was activated")
    else:
        check_file(path, artifact)
    model = open_model(path, artifact, threads, manifest.artifacts, providers)
    serving = Serving(active, manifest, artifact, model, threads)
    serving.warm_up()
    return serving


def stamp(path: Path) -> Stamp | None:
    """Changes whenever the file is replaced; ``None`` if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
