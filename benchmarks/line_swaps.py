"""A line under a steady load while its model is changed over and rolled back again and again."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from kiridashi import LineModel, Prediction
from kiridashi.errors import KiridashiError
from kiridashi.manifest import Manifest
from kiridashi.slots import Active, LineSlots

_PENDING = 20_000
_PAUSE_S = 0.2
_LAST_ANSWER_S = 60.0
_FRAMES = 16
_TOLERANCE = 2e-4
"""Of a probability: the same float32 network in two runtimes; another frame's answer differs by more."""


@dataclass
class Load:
    """What came of a load: frames asked for, those that were lost, waiting times and the versions that answered.

    ``seconds`` is the time from the first frame to the last answer.
    """

    asked: int = 0
    seconds: float = 0.0
    refused: int = 0
    failed: int = 0
    wrong: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Frames without a right answer."""
        return self.refused + self.failed + self.wrong


def swap_under_load(
    slots: LineSlots, manifests: tuple[Manifest, Manifest], artifacts: list[str], rate_hz: float, seconds: float
) -> tuple[Load, int]:
    """Ask for ``rate_hz`` predictions a second, whatever happens, while slot b is activated and rolled back.

    The activated file alternates between ``artifacts``; a change-over is asked for once the one before has come about.
    Every answer is compared with what the frame gave before. Returns the load and the number of change-overs.
    """
    frames = _frames(manifests[0])
    slots.activate(Active(slot="a", artifact=artifacts[0], model_digest=manifests[0].digest))
    stop = threading.Event()
    changes: list[str] = []
    with LineModel(slots, workers=2, pending_limit=_PENDING, look_interval_s=0.02) as model:
        expected = _expected(model, frames)
        changer = threading.Thread(target=_change, args=(slots, model, manifests[1], artifacts, stop, changes))
        changer.start()
        load = _ask(model, frames, expected, rate_hz, seconds)
        stop.set()
        changer.join()
    return load, len(changes)


def steady(slots: LineSlots, manifest: Manifest, artifact: str, rate_hz: float, seconds: float) -> Load:
    """The same load on a model that stays, for comparison."""
    frames = _frames(manifest)
    slots.activate(Active(slot="a", artifact=artifact, model_digest=manifest.digest))
    with LineModel(slots, workers=2, pending_limit=_PENDING) as model:
        return _ask(model, frames, _expected(model, frames), rate_hz, seconds)


def _frames(manifest: Manifest) -> npt.NDArray[np.uint8]:
    """Coloured patches of the model's size, each frame unlike the others."""
    side = manifest.preprocessing.height // 4
    patches = np.random.default_rng(0).integers(0, 256, (_FRAMES, 4, 4, 3), dtype=np.uint8)
    return patches.repeat(side, axis=1).repeat(side, axis=2)


def _expected(model: LineModel, frames: npt.NDArray[np.uint8]) -> list[Any]:
    values = model.predict(frames).values
    apart = np.abs(values[:, None] - values[None]).max(-1) + np.eye(len(values))
    if apart.min() < 2 * _TOLERANCE:
        raise ValueError(f"two frames give the same answer within {apart.min():.2g}; no mix-up could be seen")
    return list(values)


def _change(
    slots: LineSlots,
    model: LineModel,
    second: Manifest,
    artifacts: list[str],
    stop: threading.Event,
    changes: list[str],
) -> None:
    first = model.active
    while not stop.is_set():
        target = Active(slot="b", artifact=artifacts[len(changes) // 2 % len(artifacts)], model_digest=second.digest)
        for wanted in (target, first):
            slots.activate(wanted) if wanted is target else slots.rollback()
            while model.active != wanted and not stop.is_set():
                time.sleep(0.005)
            if model.active == wanted:
                changes.append(wanted.slot)
            stop.wait(_PAUSE_S)


def _ask(model: LineModel, frames: npt.NDArray[np.uint8], expected: list[Any], rate_hz: float, seconds: float) -> Load:
    load, lock = Load(), threading.Lock()
    futures: list[Future[Prediction]] = []
    start = time.monotonic()
    for number in range(int(rate_hz * seconds)):
        due = start + number / rate_hz
        time.sleep(max(0.0, due - time.monotonic()))
        load.asked += 1
        try:
            future = model.predict_async(frames[number % len(frames)])
        except KiridashiError:
            load.refused += 1
            continue
        right = expected[number % len(frames)]
        future.add_done_callback(lambda done, due=due, right=right: _note(done, due, right, load, lock))
        futures.append(future)
    unanswered = wait(futures, _LAST_ANSWER_S).not_done
    load.seconds = time.monotonic() - start
    with lock:
        load.failed += len(unanswered)
    return load


def _note(done: Future[Prediction], due: float, expected: Any, load: Load, lock: threading.Lock) -> None:
    waited_ms = (time.monotonic() - due) * 1e3
    error = done.exception()
    with lock:
        if error is not None:
            load.failed += 1
            return
        prediction = done.result()
        load.wrong += int(np.abs(prediction.values - expected).max() > _TOLERANCE)
        load.versions[prediction.version] = load.versions.get(prediction.version, 0) + 1
        load.latencies_ms.append(waited_ms)
