"""Lines under load: asynchronous predictions, change-overs, several lines, threads and processes at once."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.errors import BundleError, BusyError, InputError, StateError
from kiridashi.manifest import Manifest
from kiridashi.slots import Active, LineSlots

from tests.assets.tiny_bundle import LABELS, make_bundle, server_tiles
from tests.integration.device_runtime.conftest import Device, install

IMAGES, TRUTH = server_tiles(4, 50)
PREDICTING = """
import json, sys, time
import numpy as np
from kiridashi import LineModel
frames = np.load(sys.argv[2])
seen = []
with LineModel.open("press-3", sys.argv[1]) as model:
    print("ready", flush=True)
    until = time.monotonic() + 20
    while time.monotonic() < until and (not seen or seen[-1][0] != sys.argv[3]):
        prediction = model.predict(frames)
        row = [prediction.model_digest, prediction.version, prediction.indices.tolist()]
        if not seen or seen[-1] != row:
            seen.append(row)
print(json.dumps(seen))
"""


@pytest.fixture
def second(device: Device, tmp_path: Path) -> Manifest:
    """Version 2 of the line in slot b, not active."""
    make_bundle(tmp_path / "next", version=2, seed=3)
    return install(device.slots, "b", tmp_path / "next")


def activate(device: Device, slot: str, manifest: Manifest, artifact: str = "model.onnx") -> None:
    device.slots.activate(Active(slot=slot, artifact=artifact, model_digest=manifest.digest))  # type: ignore[arg-type]


def wait_for(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("did not happen in time")
        time.sleep(0.005)


class SlowModel:
    """Stands before the loaded model and holds every prediction until it is let go."""

    def __init__(self, model: LineModel) -> None:
        serving = model._serving
        self._inner = serving.model  # type: ignore[union-attr]
        self.runtime, self.provider = self._inner.runtime, self._inner.provider
        self.layout, self.frame_shape = self._inner.layout, self._inner.frame_shape
        self.go, self.entered = threading.Event(), threading.Semaphore(0)
        object.__setattr__(serving, "model", self)

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.entered.release()
        assert self.go.wait(20)
        return self._inner.run(batch)


def test_a_list_of_frames_of_several_sizes_is_a_batch(device: Device) -> None:
    tall = np.repeat(IMAGES[1], 3, axis=0)
    with LineModel.open("press-3", device.state_dir) as model:
        prediction = model.predict([IMAGES[0], tall])
        assert prediction.values.shape == (2, len(LABELS))
        assert prediction.indices.tolist() == TRUTH[:2].tolist()
        assert prediction.version == device.manifest.version == model.info().version
        for wrong in ([], ["frame"], "frame", [IMAGES], None):
            with pytest.raises(InputError, match="cannot be used as a frame"):
                model.predict(wrong)  # type: ignore[arg-type]


def test_info_tells_what_computes_the_model(device: Device) -> None:
    with LineModel.open("press-3", device.state_dir, threads=2) as model:
        info = model.info()
    assert (info.line, info.artifact, info.kind, info.tuned) == ("press-3", "model.onnx", "onnx-fp32", False)
    assert (info.provider, info.threads, info.layout) == ("cpu", 2, "NCHW")
    assert info.runtime.startswith("onnxruntime ")
    assert (info.height, info.width, info.swap_error) == (16, 16, "")
    with pytest.raises(InputError, match="at least 1"):
        LineModel.open("press-3", device.state_dir, threads=0)


def test_a_line_runs_as_the_agent_measured_unless_it_is_told_otherwise(device: Device) -> None:
    active = Active("b", "model.tflite", device.manifest.digest, providers=("cpu",), threads=2)
    install(device.slots, "b", device.slots.folder("a"))
    device.slots.activate(active)
    with LineModel.open("press-3", device.state_dir) as model:
        assert (model.info().provider, model.info().threads) == ("cpu", 2)
        device.slots.activate(msgspec.structs.replace(active, providers=("tensorrt", "xnnpack"), threads=1))
        assert model.refresh()
        assert (model.info().provider, model.info().threads) == ("xnnpack", 1)
    with LineModel.open("press-3", device.state_dir, threads=3, providers=("cpu",)) as model:
        assert (model.info().provider, model.info().threads) == ("cpu", 3)


def test_a_model_that_does_not_fit_its_labels_does_not_open(device: Device, tmp_path: Path) -> None:
    import msgspec

    folder = device.slots.folder("a")
    changed = msgspec.structs.replace(device.manifest, labels=(*LABELS, "burr"))
    (folder / "manifest.json").write_bytes(changed.encode())
    activate(device, "a", changed)
    with pytest.raises(BundleError, match="gives \\[4\\] values"):
        LineModel.open("press-3", device.state_dir)


def test_asynchronous_predictions_are_the_same_and_in_order(device: Device) -> None:
    with LineModel.open("press-3", device.state_dir) as model:
        expected = model.predict(IMAGES).values
        order: list[int] = []
        buffer = np.empty_like(IMAGES[0])
        futures = []
        for n, image in enumerate(IMAGES):
            buffer[:] = image  # a camera's buffer, used again at once
            futures.append(model.predict_async(buffer))
            futures[-1].add_done_callback(lambda _, n=n: order.append(n))
        for future, row in zip(futures, expected, strict=True):
            np.testing.assert_allclose(future.result(10).values, row, atol=1e-6)
        wait_for(lambda: len(order) == len(IMAGES))
        assert order == sorted(order)
        for wrong in (IMAGES[0, 0], None, ["frame"]):
            with pytest.raises(InputError):
                model.predict_async(wrong).result(10)  # type: ignore[arg-type]


def test_asynchronous_predictions_in_asyncio(device: Device) -> None:
    async def ask(model: LineModel) -> list[int]:
        waiting = [asyncio.wrap_future(model.predict_async(image)) for image in IMAGES]
        return [prediction.index for prediction in await asyncio.gather(*waiting)]

    with LineModel.open("press-3", device.state_dir, workers=2) as model:
        assert asyncio.run(ask(model)) == TRUTH.tolist()


def test_too_many_waiting_predictions_are_refused_and_then_taken_again(device: Device) -> None:
    model = LineModel.open("press-3", device.state_dir, pending_limit=2)
    slow = SlowModel(model)
    waiting = [model.predict_async(IMAGES[0]), model.predict_async(IMAGES[1])]
    with pytest.raises(BusyError, match="2 predictions"):
        model.predict_async(IMAGES[2])
    slow.go.set()
    assert [future.result(10).index for future in waiting] == TRUTH[:2].tolist()
    assert model.predict_async(IMAGES[2]).result(10).index == TRUTH[2]
    model.close()


def test_a_place_is_free_as_soon_as_its_result_is_there_or_it_was_cancelled(device: Device) -> None:
    with LineModel.open("press-3", device.state_dir, pending_limit=1) as model:
        for _ in range(300):
            model.predict_async(IMAGES[0]).result(10)
    model = LineModel.open("press-3", device.state_dir, pending_limit=2)
    slow = SlowModel(model)
    first, second = model.predict_async(IMAGES[0]), model.predict_async(IMAGES[1])
    slow.entered.acquire()
    assert second.cancel()
    third = model.predict_async(IMAGES[2])
    with pytest.raises(BusyError):
        model.predict_async(IMAGES[2])
    slow.go.set()
    assert [future.result(10).index for future in (first, third)] == TRUTH[[0, 2]].tolist()
    model.close()


def test_closing_finishes_what_was_accepted(device: Device) -> None:
    model = LineModel.open("press-3", device.state_dir)
    slow = SlowModel(model)
    future = model.predict_async(IMAGES[0])
    slow.entered.acquire()
    closing = threading.Thread(target=model.close)
    closing.start()
    wait_for(lambda: model._closed)
    slow.go.set()
    closing.join(10)
    assert future.result(0).index == TRUTH[0]
    model.close()
    for call in (model.predict, model.predict_async):
        with pytest.raises(StateError, match="was closed"):
            call(IMAGES[0])
    with pytest.raises(StateError, match="was closed"):
        model.info()


def test_a_prediction_under_way_finishes_on_the_old_model(device: Device, second: Manifest) -> None:
    with LineModel.open("press-3", device.state_dir) as model:
        slow = SlowModel(model)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(model.predict, IMAGES[0])
            slow.entered.acquire()
            activate(device, "b", second)
            assert model.refresh()
            assert model.predict(IMAGES[0]).model_digest == second.digest
            slow.go.set()
            assert under_way.result(10).model_digest == device.manifest.digest


@pytest.mark.parametrize("artifact", ["model.onnx", "model.tflite"])
def test_changes_over_and_back_lose_nothing(device: Device, second: Manifest, artifact: str) -> None:
    model = LineModel(device.slots, workers=2, pending_limit=1000, look_interval_s=0.002)
    stop, failures, digests = threading.Event(), [], Counter[str]()
    lock = threading.Lock()

    def note(prediction: object) -> None:
        with lock:
            digests[prediction.model_digest] += 1  # type: ignore[attr-defined]
        assert prediction.indices.tolist() == TRUTH.tolist()  # type: ignore[attr-defined]

    def work(*, later: bool) -> None:
        while not stop.is_set():
            try:
                note(model.predict_async(IMAGES).result(20) if later else model.predict(IMAGES))
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)
                return

    workers = [threading.Thread(target=work, kwargs={"later": later}) for later in (False, True, False)]
    for worker in workers:
        worker.start()
    for _ in range(4):
        activate(device, "b", second, artifact)
        wait_for(lambda: failures or model.active.model_digest == second.digest)
        device.slots.rollback()
        wait_for(lambda: failures or model.active.model_digest == device.manifest.digest)
    stop.set()
    for worker in workers:
        worker.join()
    model.close()
    assert failures == []
    assert digests.keys() == {device.manifest.digest, second.digest}


def test_a_slot_that_is_corrupt_is_tried_again_until_it_is_whole(
    device: Device, second: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    path = device.slots.folder("b") / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with LineModel(device.slots, look_interval_s=0.0, retry_interval_s=0.05) as model:
        activate(device, "b", second)
        with caplog.at_level(logging.ERROR):
            wait_for(lambda: model.predict(IMAGES[0]) and model.swap_error)
            assert model.info().swap_error == str(model.swap_error)
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                assert model.predict(IMAGES[0]).model_digest == device.manifest.digest
        assert caplog.text.count("keeps its model") == 1
        path.write_bytes(whole)
        wait_for(lambda: model.predict(IMAGES[0]).model_digest == second.digest)
        assert model.info().swap_error == ""


def test_several_lines_in_one_process_keep_apart(device: Device, tmp_path: Path) -> None:
    other = LineSlots(device.state_dir, "weld-1")
    make_bundle(tmp_path / "weld", line="weld-1", version=7, seed=9)
    manifest = install(other, "a", tmp_path / "weld")
    other.activate(Active(slot="a", artifact="model.tflite", model_digest=manifest.digest))
    with (
        LineModel.open("press-3", device.state_dir) as press,
        LineModel.open("weld-1", device.state_dir) as weld,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(model.predict, IMAGES) for model in (press, weld) * 20]
        seen = [future.result(20) for future in asked]
        assert {prediction.version for prediction in seen[::2]} == {1}
        assert {(prediction.version, prediction.model_digest) for prediction in seen[1::2]} == {(7, manifest.digest)}
        assert (press.info().provider, weld.info().provider) == ("cpu", "xnnpack")
        press.close()
        assert weld.predict(IMAGES[0]).index == TRUTH[0]


def test_several_processes_change_over_and_go_on(device: Device, second: Manifest, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", IMAGES)
    command = [sys.executable, "-c", PREDICTING, str(device.state_dir), str(tmp_path / "frames.npy"), second.digest]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        activate(device, "b", second)
        answers = [json.loads(process.communicate(timeout=40)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    expected = [[device.manifest.digest, 1, TRUTH.tolist()], [second.digest, 2, TRUTH.tolist()]]
    assert answers == [expected, expected]


def _in_child(model: LineModel, state: Path, answers: Any) -> None:
    said = []
    for call in (model.predict, model.predict_async):
        try:
            call(IMAGES[0])
        except StateError as error:
            said.append(error.what)
    model.close()
    with LineModel.open("press-3", state) as own:
        answers.put((said, own.predict_async(IMAGES[0]).result(20).index))


def test_a_model_from_before_a_fork_is_refused_and_a_new_one_works(device: Device) -> None:
    context = multiprocessing.get_context("fork")
    with LineModel.open("press-3", device.state_dir, threads=2) as model:
        model.predict_async(IMAGES[0]).result(10)
        answers = context.Queue()
        child = context.Process(target=_in_child, args=(model, device.state_dir, answers))
        child.start()
        try:
            said, index = answers.get(timeout=60)
        finally:
            child.join(10)
            child.kill()
        assert said == ["the model of line 'press-3' was opened before this process was forked"] * 2
        assert index == TRUTH[0]
        assert child.exitcode == 0
        assert model.predict(IMAGES[0]).index == TRUTH[0]
