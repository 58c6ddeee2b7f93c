"""The line application's side: predict with whatever model is active, and change over without losing a frame.

``LineModel`` reads the slots by itself, so predicting needs no agent. It checks what it loads: the shipped file
against the manifest and the pointer, a tuned file against the device's own seal.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from kiridashi.errors import BusyError, InputError, KiridashiError, StateError
from kiridashi.prediction import Prediction
from kiridashi.runtime.protocol import Provider
from kiridashi.serving import Frames, LineInfo, Serving, load_active, stamp
from kiridashi.slots import Active, LineSlots, default_state_dir
from kiridashi.spool import Spool

__all__ = ["LineInfo", "LineModel", "Prediction"]

LOOK_INTERVAL_S = 0.2
RETRY_INTERVAL_S = 30.0
_log = logging.getLogger(__name__)
_open_models: weakref.WeakSet[LineModel] = weakref.WeakSet()
_left_to_the_parent: list[Serving] = []


class LineModel:
    """The active model of one line. Make it with :meth:`open`; it may be used from several threads.

    When the agent activates another model, the next prediction notices (it looks at the pointer at most every 200 ms).
    A thread loads and warms up the new model while the old one goes on serving, and then the two change over;
    predictions under way finish on the model that they began with. If the new one cannot be loaded, the old one
    stays, the error is logged and kept in ``swap_error``, and another try is made after 30 s.

    For that time both models are in memory. Every process opens a ``LineModel`` of its own: one that was opened before
    a fork cannot be used in the child, where the runtime's threads are missing, and says so.

    Attributes:
        spool: where predicted frames are offered; ``spool.counts()`` tells what became of them. ``None`` if nowhere.
        swap_error: why a newer model is not used.
    """

    def __init__(
        self,
        slots: LineSlots,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        workers: int = 1,
        pending_limit: int = 64,
        spool: Spool | None = None,
        look_interval_s: float = LOOK_INTERVAL_S,
        retry_interval_s: float = RETRY_INTERVAL_S,
    ) -> None:
        if min(1 if threads is None else threads, workers, pending_limit) < 1:
            raise InputError("threads, workers and pending_limit are at least 1")
        if spool is not None and spool.folder.line != slots.line:
            raise InputError(f"a spool of line '{spool.folder.line}' cannot take frames of line '{slots.line}'")
        self.swap_error: KiridashiError | None = None
        self.spool = spool
        self._closes_spool = False
        self._slots = slots
        self._threads = threads
        self._providers = None if providers is None else tuple(providers)
        self._intervals_s = (look_interval_s, retry_interval_s)
        self._closed = False
        self._swap_lock = threading.Lock()
        self._looking = threading.Lock()
        self._swapper: threading.Thread | None = None
        self._retry_at = math.inf
        self._free = threading.BoundedSemaphore(pending_limit)
        self._pending_limit = pending_limit
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix=f"line-{slots.line}")
        self._seen = stamp(slots.pointer_path)
        self._serving: Serving | None = load_active(slots, threads, self._providers)
        self._next_look = time.monotonic() + look_interval_s
        self._forked = False
        _open_models.add(self)

    @classmethod
    def open(
        cls,
        line: str,
        state_dir: Path | str | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        workers: int = 1,
        pending_limit: int = 64,
        spool: Spool | bool = False,
    ) -> LineModel:
        """Load a line's active model and warm it up.

        Args:
            line: the line's name.
            state_dir: the device's state folder; ``$KIRIDASHI_STATE``, else ``/var/lib/kiridashi``.
            threads: threads inside one prediction; by default as many as the agent measured with, else 1.
            providers: what may compute the model, best first; :meth:`info` tells what was chosen. The default is what
                the agent measured with, ``providers`` of the line in ``config.toml``: its figures hold for no other.
            workers: predictions of :meth:`predict_async` that run at once.
            pending_limit: predictions of :meth:`predict_async` that may wait or run.
            spool: ``True`` offers every predicted frame to the line's spool, for people to name; :meth:`close` closes
                it. A spool of the caller's, with limits of its own, is left open.

        Raises:
            InputError: not a line name, a number below 1, or the spool of another line.
            StateError: no model is active, the state folder is damaged, or memory is short.
            BundleError, TrustError: a file is not what its manifest or seal says, or the model cannot run.
            RuntimeUnavailableError: the model's runtime is not installed, or none of ``providers`` is here.
        """
        folder = default_state_dir() if state_dir is None else Path(state_dir)
        slots = LineSlots(folder, line)
        place = Spool.open(line, folder) if spool is True else spool or None
        model = cls(slots, threads, providers, workers, pending_limit, place)
        model._closes_spool = spool is True
        return model

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

    def info(self) -> LineInfo:
        """What is serving and what computes it. Raises StateError after :meth:`close`."""
        return self._current().info(self._slots.line, self.swap_error)

    def predict(self, frames: Frames) -> Prediction:
        """Predict one frame, uint8 RGB [H, W, 3], a batch [N, H, W, 3], or a list of frames; resized where needed.

        The frames of a list may differ in size; its prediction is that of a batch. With a spool, every frame is offered
        to it, which takes microseconds and cannot fail.

        Raises:
            InputError: not such frames.
            StateError: the model was closed.
            BundleError: the runtime fails.
        """
        if time.monotonic() >= self._next_look:
            self._look()
        serving = self._current()
        prediction = serving.predict(frames)
        if self.spool is not None:
            size = serving.manifest.preprocessing
            _offer(self.spool, frames, prediction, (size.height, size.width))
        return prediction

    def predict_async(self, frames: Frames) -> Future[Prediction]:
        """:meth:`predict` in a thread of the model's own; the frames are copied, so the buffer may be used again.

        With one worker, predictions finish in the order of the calls. In asyncio:
        ``await asyncio.wrap_future(model.predict_async(frame))``.

        Raises:
            BusyError: as many predictions as ``pending_limit`` are waiting; nothing was accepted.
            StateError: the model was closed.
        """
        self._current()
        if not self._free.acquire(blocking=False):
            raise BusyError(
                f"{self._pending_limit} predictions of line '{self._slots.line}' are waiting already",
                why="frames come faster than the model predicts",
                next_step="wait for earlier predictions, or drop this frame",
            )
        try:
            future = self._workers.submit(self._work, _copied(frames))
        except BaseException as error:
            self._free.release()
            if self._closed and isinstance(error, RuntimeError):
                raise self._was_closed() from error
            raise
        future.add_done_callback(self._give_back_if_cancelled)
        return future

    def _work(self, frames: Frames) -> Prediction:
        try:
            return self.predict(frames)
        finally:
            # Before the result is set, or whoever waited for it could find its own place still taken.
            self._free.release()

    def _give_back_if_cancelled(self, future: Future[Prediction]) -> None:
        if future.cancelled():
            self._free.release()

    def refresh(self) -> bool:
        """Change over to the active model now, and return whether there was another one.

        Raises:
            as :meth:`open`; the old model then goes on serving.
        """
        with self._swap_lock:
            serving = self._current()
            self._seen = stamp(self._slots.pointer_path)
            self._retry_at = math.inf
            if self._slots.active() == serving.active:
                self.swap_error = None
                return False
            self._serving = load_active(self._slots, self._threads, self._providers)
            self.swap_error = None
            _log.info("line %s changed over to %s", self._slots.line, self._serving.active.model_digest)
            return True

    def close(self) -> None:
        """Refuse new predictions, finish those under way, and drop the model. A second call does nothing."""
        self._closed = True
        self._workers.shutdown(wait=True)
        if self._swapper is not None:
            self._swapper.join()
        with self._swap_lock:
            self._serving = None
        if self.spool is not None and self._closes_spool:
            self.spool.close()

    def _current(self) -> Serving:
        serving = self._serving
        if serving is None:
            raise self._was_closed()
        return serving

    def _was_closed(self) -> StateError:
        if self._forked:
            what = f"the model of line '{self._slots.line}' was opened before this process was forked"
            return StateError(what, next_step="open it in the new process")
        return StateError(f"the model of line '{self._slots.line}' was closed", next_step="open it again")

    def _leave_to_parent(self) -> None:
        """In a forked child: refuse to predict. Freeing the model would wait for threads that only the parent has."""
        if self._serving is not None:
            _left_to_the_parent.append(self._serving)
        self._serving, self._swapper, self._swap_lock = None, None, threading.Lock()
        self._closed = self._forked = True
        self.spool = None
        self._workers = ThreadPoolExecutor(1)

    def _look(self) -> None:
        """Start a change-over if the pointer has been replaced; costs a stat. One thread looks, the others go on."""
        if self._closed or not self._looking.acquire(blocking=False):
            return
        try:
            now = time.monotonic()
            self._next_look = now + self._intervals_s[0]
            changed = stamp(self._slots.pointer_path) != self._seen
            busy = self._swapper is not None and self._swapper.is_alive()
            if busy or not (changed or now >= self._retry_at):
                return
            self._swapper = threading.Thread(target=self._swap, name=f"swap-{self._slots.line}", daemon=True)
            self._swapper.start()
        finally:
            self._looking.release()

    def _swap(self) -> None:
        try:
            self.refresh()
        except KiridashiError as error:
            self._retry_at = time.monotonic() + self._intervals_s[1]
            if not self._closed and str(error) != str(self.swap_error):
                _log.error("line %s keeps its model: the new one cannot be used: %s", self._slots.line, error)
            self.swap_error = error


def _offer(spool: Spool, frames: Frames, prediction: Prediction, size: tuple[int, int]) -> None:
    """Each frame with its own values, also those of a batch: a request to the line server always is one."""
    digest, labels = prediction.model_digest, prediction.labels
    if prediction.values.ndim == 1:
        spool.offer(frames, prediction.values, digest, labels)  # type: ignore[arg-type]
        spool.sampler.offer(frames, prediction.values, digest, size)  # type: ignore[arg-type]
        return
    for frame, values in zip(frames, prediction.values, strict=False):  # nothing may fail for the spool's sake
        spool.offer(frame, values, digest, labels)
        spool.sampler.offer(frame, values, digest, size)


def _copied(frames: Frames) -> Frames:
    """The frames in memory of their own; what is no frame stays as it is, and is refused when its turn comes."""
    if isinstance(frames, np.ndarray):
        return frames.copy()
    if isinstance(frames, list | tuple):
        return [frame.copy() if isinstance(frame, np.ndarray) else frame for frame in frames]
    return frames


def _after_fork() -> None:
    for model in list(_open_models):
        model._leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
