from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

import kiridashi.serving as serving_module
import msgspec
import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.artifacts import check_file, sha256_file
from kiridashi.errors import BundleError, InputError, StateError, TrustError
from kiridashi.preprocess import resize, softmax
from kiridashi.slots import Active
from kiridashi.trust import SEAL_NAME, Seal, load_or_create_key, sign_seal

from tests.assets.tiny_bundle import LABELS, make_bundle, server_tiles
from tests.integration.device_runtime.conftest import Device, install

IMAGES, TRUTH = server_tiles(4, 50)


def fake_tuned(device: Device, slot: str = "a") -> Active:
    """Sealed files in a slot, equal to the shipped ones, activated."""
    folder = device.slots.folder(slot)  # type: ignore[arg-type]
    tuned = folder / "tuned"
    tuned.mkdir()
    shutil.copy(folder / "model.onnx", tuned)
    seal = Seal(
        line="press-3",
        device="dev-1",
        parent=device.manifest.digest,
        artifacts={"model.onnx": sha256_file(tuned / "model.onnx")},
        values="0" * 64,
        accuracy_before=0.5,
        accuracy_after=0.6,
        holdout=4,
    )
    signed = sign_seal(seal, load_or_create_key(device.state_dir))
    (tuned / SEAL_NAME).write_bytes(signed.encode())
    active = Active(slot=slot, artifact="model.onnx", model_digest=signed.digest, tuned=True)  # type: ignore[arg-type]
    device.slots.activate(active)
    return active


def test_one_frame(device: Device) -> None:
    with LineModel.open(line="press-3", state_dir=device.state_dir) as model:
        prediction = model.predict(IMAGES[0])
        assert prediction.values.shape == (len(LABELS),)
        assert prediction.values.sum() == pytest.approx(1)
        assert prediction.label == LABELS[TRUTH[0]]
        assert prediction.confidence == prediction.values.max()
        assert prediction.index == TRUTH[0]
        assert prediction.labels == model.labels == LABELS
        assert prediction.model_digest == device.manifest.digest == model.active.model_digest


@pytest.mark.parametrize("artifact", ["model.onnx", "model.tflite"])
def test_a_batch_is_what_the_probe_says(device: Device, artifact: str) -> None:
    device.slots.activate(Active(slot="a", artifact=artifact, model_digest=device.manifest.digest))
    with np.load(device.slots.folder("a") / "probe.npz") as probe, LineModel.open("press-3", device.state_dir) as model:
        prediction = model.predict(probe["images"])
        np.testing.assert_allclose(prediction.values, softmax(probe[f"logits.{artifact}"]), atol=1e-5)
        assert prediction.indices.tolist() == probe[f"logits.{artifact}"].argmax(1).tolist()
    with pytest.raises(InputError, match="12 frames"):
        _ = prediction.label


def test_state_folder_from_the_environment(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIRIDASHI_STATE", str(device.state_dir))
    with LineModel.open("press-3") as model:
        assert model.predict(IMAGES[0]).index == TRUTH[0]


def test_camera_frames_are_resized(device: Device) -> None:
    large = resize(IMAGES, 120, 160)
    with LineModel.open("press-3", device.state_dir) as model:
        assert model.predict(large).indices.tolist() == TRUTH.tolist()


def test_what_is_no_frame_is_refused(device: Device) -> None:
    with LineModel.open("press-3", device.state_dir) as model, pytest.raises(InputError, match="float32"):
        model.predict(IMAGES[0].astype(np.float32))  # type: ignore[arg-type]


def test_no_active_model(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no active model") as caught:
        LineModel.open("press-3", tmp_path)
    assert "--state" in caught.value.next_step
    (tmp_path / "lines").mkdir()
    with pytest.raises(StateError, match="no active model") as caught:
        LineModel.open("press-3", tmp_path)
    assert "kiridashi-agent" in caught.value.next_step


def test_a_mistyped_line_is_told_which_lines_there_are(device: Device) -> None:
    with pytest.raises(StateError, match="'pres-3' has no active model") as caught:
        LineModel.open("pres-3", device.state_dir)
    assert caught.value.next_step == "lines with a model here: press-3"


def test_a_state_folder_that_is_none_is_not_to_be_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="Not a directory") as caught:
        LineModel.open("press-3", tmp_path / "file")
    assert caught.value.next_step == "check whose the state folder is"


def test_a_closed_model(device: Device) -> None:
    model = LineModel.open("press-3", device.state_dir)
    model.close()
    with pytest.raises(StateError, match="was closed"):
        model.predict(IMAGES[0])


@pytest.mark.parametrize(("name", "error"), [("model.onnx", BundleError), ("manifest.json", (BundleError, TrustError))])
def test_one_changed_byte_is_noticed(device: Device, name: str, error: type[Exception]) -> None:
    path = device.slots.folder("a") / name
    data = bytearray(path.read_bytes())
    position = data.index(b"tiles") if name == "manifest.json" else len(data) // 2
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(error):
        LineModel.open("press-3", device.state_dir)


def test_damaged_pointer(device: Device) -> None:
    device.slots.pointer_path.write_text("{")
    with pytest.raises(StateError, match="active pointer"):
        LineModel.open("press-3", device.state_dir)


def test_missing_manifest(device: Device) -> None:
    (device.slots.folder("a") / "manifest.json").unlink()
    with pytest.raises(StateError, match=r"cannot be read.*manifest\.json"):
        LineModel.open("press-3", device.state_dir)


def test_sealed_model_has_the_seals_digest(device: Device) -> None:
    active = fake_tuned(device)
    with LineModel.open("press-3", device.state_dir) as model:
        assert model.predict(IMAGES[0]).model_digest == active.model_digest != device.manifest.digest


@pytest.mark.parametrize("damage", ["file", "seal", "key", "no key"])
def test_wrong_seals_are_refused(device: Device, damage: str) -> None:
    fake_tuned(device)
    tuned = device.slots.folder("a") / "tuned"
    if damage == "file":
        data = bytearray((tuned / "model.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (tuned / "model.onnx").write_bytes(data)
    elif damage == "seal":
        seal = msgspec.json.decode((tuned / SEAL_NAME).read_bytes(), type=Seal)
        (tuned / SEAL_NAME).write_bytes(msgspec.structs.replace(seal, accuracy_after=0.99).encode())
    else:
        shutil.rmtree(device.state_dir / "trust")
        if damage == "key":
            load_or_create_key(device.state_dir)
    with pytest.raises(TrustError):
        LineModel.open("press-3", device.state_dir)


def test_change_over_loses_no_prediction(device: Device, tmp_path: Path) -> None:
    make_bundle(tmp_path / "next", version=2, seed=3)
    model = LineModel(device.slots, threads=1, look_interval_s=0.01)
    digests: list[str] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                prediction = model.predict(IMAGES)
                digests.append(prediction.model_digest)
                if prediction.indices.tolist() != TRUTH.tolist():
                    raise AssertionError("a frame was mistaken")
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)
                return

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    manifest = install(device.slots, "b", tmp_path / "next")
    device.slots.activate(Active(slot="b", artifact="model.onnx", model_digest=manifest.digest))
    wait_for(lambda: digests[-1] == manifest.digest)
    device.slots.rollback()
    wait_for(lambda: digests[-1] == device.manifest.digest)
    stop.set()
    for worker in workers:
        worker.join()
    model.close()
    assert failures == []
    assert set(digests) == {device.manifest.digest, manifest.digest}


def test_a_pointer_replaced_while_loading_is_followed(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent activates slot b and empties slot a while a line process is still reading slot a."""
    make_bundle(tmp_path / "next", version=2, seed=3)
    manifest = install(device.slots, "b", tmp_path / "next")
    reads = []

    def read_late(path: Path, artifact: object) -> None:
        reads.append(path)
        if len(reads) == 1:
            device.slots.activate(Active(slot="b", artifact="model.onnx", model_digest=manifest.digest))
            device.slots.prepare("a")
        check_file(path, artifact)  # type: ignore[arg-type]

    monkeypatch.setattr(serving_module, "check_file", read_late)
    with LineModel.open("press-3", device.state_dir) as model:
        assert model.predict(IMAGES[0]).model_digest == manifest.digest
    assert len(reads) == 2


def test_refresh_changes_over_at_once(device: Device, tmp_path: Path) -> None:
    make_bundle(tmp_path / "next", version=2, seed=3)
    with LineModel.open("press-3", device.state_dir) as model:
        assert not model.refresh()
        manifest = install(device.slots, "b", tmp_path / "next")
        device.slots.activate(Active(slot="b", artifact="model.tflite", model_digest=manifest.digest))
        assert model.refresh()
        assert model.predict(IMAGES[0]).model_digest == manifest.digest


def test_a_bad_new_model_leaves_the_old_one_serving(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_bundle(tmp_path / "next", version=2, seed=3)
    with LineModel(device.slots, threads=1, look_interval_s=0.0) as model:
        manifest = install(device.slots, "b", tmp_path / "next")
        (device.slots.folder("b") / "model.onnx").write_bytes(b"broken")
        device.slots.activate(Active(slot="b", artifact="model.onnx", model_digest=manifest.digest))
        with caplog.at_level(logging.ERROR):
            wait_for(lambda: model.predict(IMAGES[0]) is not None and model.swap_error is not None)
        assert isinstance(model.swap_error, BundleError)
        assert "keeps its model" in caplog.text
        assert model.predict(IMAGES[0]).model_digest == device.manifest.digest
        with pytest.raises(BundleError):
            model.refresh()
        device.slots.rollback()
        assert not model.refresh()


def wait_for(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            pytest.fail("did not happen in time")
        time.sleep(0.01)
