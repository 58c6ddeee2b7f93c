"""The line application's side: predict with whatever model is active, and change over without losing a frame.

``LineModel`` reads the slots by itself, so predicting needs no agent. It checks what it loads: the shipped file
against the manifest and the pointer, a tuned file against the device's own seal.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from kiridashi.artifacts import MANIFEST_NAME, check_file
from kiridashi.errors import InputError, KiridashiError, StateError, TrustError
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi.preprocess import as_frames, softmax, to_input
from kiridashi.runtime import open_model
from kiridashi.runtime.protocol import FloatArray, LoadedModel
from kiridashi.slots import TUNED_NAME, Active, LineSlots, default_state_dir
from kiridashi.trust import check_tuned, load_public_key

LOOK_INTERVAL_S = 0.2
_LOAD_ATTEMPTS = 3
_log = logging.getLogger(__name__)
_Stamp = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one frame or of a batch.

    Attributes:
        values: probabilities, float32 [classes] for one frame, [N, classes] for a batch.
        labels: the class names, in the order of ``values``.
        model_digest: the model that predicted; a locally tuned model has a digest of its own.
    """

    values: FloatArray
    labels: tuple[str, ...]
    model_digest: str

    @property
    def index(self) -> int:
        """The best class of one frame.

        Raises:
            InputError: this is a batch; use ``indices``.
        """
        if self.values.ndim != 1:
            raise InputError(f"this prediction is of {len(self.values)} frames", next_step="use .indices")
        return int(self.values.argmax())

    @property
    def label(self) -> str:
        """The name of the best class of one frame. Raises as ``index``."""
        return self.labels[self.index]

    @property
    def confidence(self) -> float:
        """The probability of the best class of one frame. Raises as ``index``."""
        return float(self.values[self.index])

    @property
    def indices(self) -> NDArray[np.int64]:
        """The best class of every frame, int64 [N]; [1] for one frame."""
        best: NDArray[np.int64] = np.atleast_2d(self.values).argmax(axis=1)
        return best


@dataclass(frozen=True)
class _Serving:
    """A loaded model with what is needed to use it."""

    active: Active
    manifest: Manifest
    model: LoadedModel


class LineModel:
    """The active model of one line. Make it with :meth:`open`; it may be used from several threads.

    When the agent activates another model, ``predict`` notices (it looks at the pointer at most every 200 ms), a
    thread loads the new model while the old one goes on serving, and then the two change over. If the new one cannot
    be loaded, the old one stays, the error is logged and kept in ``swap_error``.
    """

    def __init__(self, slots: LineSlots, threads: int, look_interval_s: float = LOOK_INTERVAL_S) -> None:
        self.swap_error: KiridashiError | None = None
        self._slots = slots
        self._threads = threads
        self._interval_s = look_interval_s
        self._swap_lock = threading.Lock()
        self._swapper: threading.Thread | None = None
        self._seen = _stamp(slots.pointer_path)
        self._serving: _Serving | None = _load(slots, threads)
        self._next_look = time.monotonic() + look_interval_s

    @classmethod
    def open(cls, line: str, state_dir: Path | str | None = None, threads: int = 1) -> LineModel:
        """Load a line's active model.

        Args:
            line: the line's name.
            state_dir: the device's state folder; ``$KIRIDASHI_STATE``, else ``/var/lib/kiridashi``.
            threads: threads inside one prediction.

        Raises:
            InputError: not a line name.
            StateError: no model is active, or the state folder is damaged.
            BundleError, TrustError: a file is not what its manifest or seal says.
            RuntimeUnavailableError: the model's runtime is not installed.
        """
        folder = default_state_dir() if state_dir is None else Path(state_dir)
        return cls(LineSlots(folder, line), threads)

    def __enter__(self) -> LineModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def active(self) -> Active:
        """What is serving. Raises StateError after :meth:`close`."""
        return self._current().active

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names. Raises StateError after :meth:`close`."""
        return self._current().manifest.labels

    def predict(self, frame: NDArray[np.uint8]) -> Prediction:
        """Predict one frame, uint8 RGB [H, W, 3], or a batch [N, H, W, 3]; any size, resized where needed.

        Raises:
            InputError: not such a frame.
            StateError: the model was closed.
        """
        self._look()
        serving = self._current()
        batch = to_input(as_frames(frame), serving.manifest.preprocessing, serving.model.layout)
        values = softmax(serving.model.run(batch))
        return Prediction(
            values[0] if frame.ndim == 3 else values, serving.manifest.labels, serving.active.model_digest
        )

    def refresh(self) -> bool:
        """Change over to the active model now, and return whether there was another one.

        Raises:
            as :meth:`open`; the old model then goes on serving.
        """
        with self._swap_lock:
            serving = self._current()
            self._seen = _stamp(self._slots.pointer_path)
            if self._slots.active() == serving.active:
                return False
            self._serving = _load(self._slots, self._threads)
            self.swap_error = None
            _log.info("line %s changed over to %s", self._slots.line, self._serving.active.model_digest)
            return True

    def close(self) -> None:
        """Drop the model; waits for a change-over under way."""
        if self._swapper is not None:
            self._swapper.join()
        with self._swap_lock:
            self._serving = None

    def _current(self) -> _Serving:
        serving = self._serving
        if serving is None:
            raise StateError(f"the model of line '{self._slots.line}' was closed", next_step="open it again")
        return serving

    def _look(self) -> None:
        """Start a change-over if the pointer has been replaced; costs a clock reading, and now and then a stat."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + self._interval_s
        stamp = _stamp(self._slots.pointer_path)
        if stamp == self._seen or (self._swapper is not None and self._swapper.is_alive()):
            return
        self._seen = stamp
        self._swapper = threading.Thread(target=self._swap, name=f"swap-{self._slots.line}", daemon=True)
        self._swapper.start()

    def _swap(self) -> None:
        try:
            self.refresh()
        except KiridashiError as error:
            self.swap_error = error
            _log.error("line %s keeps its model: the new one cannot be used: %s", self._slots.line, error)


def _load(slots: LineSlots, threads: int, attempts: int = _LOAD_ATTEMPTS) -> _Serving:
    """Load what the pointer names; if the pointer is replaced meanwhile, a failure is the old one's: try again."""
    stamp = _stamp(slots.pointer_path)
    try:
        return _load_once(slots, threads)
    except (KiridashiError, OSError) as error:
        if attempts > 1 and _stamp(slots.pointer_path) != stamp:
            return _load(slots, threads, attempts - 1)
        if isinstance(error, KiridashiError):
            raise
        raise StateError(f"the model of line '{slots.line}' cannot be read", why=str(error)) from error


def _load_once(slots: LineSlots, threads: int) -> _Serving:
    active = slots.active()
    if active is None:
        raise StateError(
            f"line '{slots.line}' has no active model",
            why=f"{slots.pointer_path} does not exist",
            next_step="run kiridashi-agent run until the line is active; kiridashi-agent status shows where it is",
        )
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
    return _Serving(active, manifest, open_model(path, artifact, threads, manifest.artifacts))


def _stamp(path: Path) -> _Stamp | None:
    """Changes whenever the file is replaced; ``None`` if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
