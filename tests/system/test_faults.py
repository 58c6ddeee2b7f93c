"""What goes wrong at a plant, done to the installed commands: each is refused by name, and the old model keeps serving.

Every test has a plant and a device of its own. The device serves version 1 when the fault comes.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import server_of_the_past
from installed import Device, Plant, bytes_on_disk, killed_at_the_end, wait_until_killed, write_frames
from kiridashi import LineModel
from kiridashi.artifacts import MANIFEST_NAME, describe_file
from kiridashi.budget import MIB
from kiridashi.manifest import CHUNK_BYTES, Manifest
from tiny_bundle import make_bundle

TRUST, NETWORK, RUNTIME = 31, 40, 50
LINE = "press-3"
# For a child's PYTHONPATH: the runtimes are as good as not installed, for import and for looking.
WITHOUT_RUNTIMES = (
    "import sys\nsys.modules.update(dict.fromkeys(('onnxruntime', 'ai_edge_litert', 'tflite_runtime')))\n"
)


def bundle(plant: Plant, version: int) -> Manifest:
    return make_bundle(plant.folder / f"bundle-{version}", version=version, seed=version)


@contextmanager
def still_serving(device: Device, plant: Plant) -> Iterator[None]:
    """Whatever happens in the block: a running line application and a new one get the same model's same answers."""
    frames = plant.folder / "frames.npy"
    write_frames(frames)
    images = np.load(frames)
    said = device.predict(frames)
    with LineModel.open(LINE, device.state) as model:
        before = model.predict(images)
        yield
        time.sleep(0.25)  # longer than the pause between two looks at the pointer
        after = model.predict(images)
        assert model.swap_error is None
    assert before.model_digest == after.model_digest == said[0]
    np.testing.assert_array_equal(before.values, after.values)
    assert device.predict(frames) == said


def refused(device: Device, code: int, kind: str, phase: str) -> str:
    """Let the device settle; check how it refused, and return what it says."""
    seen, line = device.once()
    error = line["error"]
    assert (seen, line["phase"], error["kind"], error["phase"]) == (code, "rejected", kind, phase), line
    assert line["slot"] == "a"
    return str(error["message"])


def goes_on(plant: Plant, device: Device, version: int) -> None:
    """The plant is well again: the next version is delivered as if nothing had been."""
    bundle(plant, version)
    plant.publish(plant.folder / f"bundle-{version}")
    code, line = device.once()
    assert (code, line["phase"], line["version"], line["slot"]) == (0, "active", version, "b"), line


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def pad_probe(folder: Path, manifest: Manifest, size: int) -> Manifest:
    """Make the bundle's download long: noise beside the known frames, which nothing reads."""
    path = folder / "probe.npz"
    with np.load(path) as known:
        arrays = dict(known)
    np.savez(path, noise=np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8), **arrays)
    others = tuple(entry for entry in manifest.artifacts if entry.kind != "probe")
    padded = msgspec.structs.replace(manifest, artifacts=(*others, describe_file(path, "probe")))
    (folder / MANIFEST_NAME).write_bytes(padded.encode())
    return padded


def test_a_download_killed_in_the_middle_is_resumed_and_activated(plant, device) -> None:
    folder, size = plant.folder / "bundle-2", 48 * MIB
    manifest = pad_probe(folder, bundle(plant, 2), size)
    part = device.state / "lines" / LINE / "b" / "probe.npz.part"
    with plant.serving():
        plant.publish(folder)
        with still_serving(device, plant), killed_at_the_end(device.start()) as agent:
            wait_until_killed(agent, lambda: bytes_on_disk(part) >= 4 * MIB, timeout_s=60)
        assert device.succeed("status")["lines"][LINE]["state"]["phase"] == "downloading"
        code, line = device.once()
    assert (code, line["phase"], line["version"], line["slot"]) == (0, "active", 2, "b"), line
    delivery = line["delivery"]
    # What was written when it died is not fetched again, but for one window of requests.
    assert delivery["resumed_chunks"] >= 4 * MIB // CHUNK_BYTES - 4
    assert delivery["chunks"] < size // CHUNK_BYTES
    # The line may be tuned later, so what that takes is fetched as well; every runtime is here.
    assert delivery["resumed_chunks"] + delivery["chunks"] == sum(len(entry.chunks) for entry in manifest.artifacts)
    assert not list(part.parent.glob("*.part"))


def test_a_changed_chunk_in_the_server_s_store_is_refused(plant, device) -> None:
    model = bundle(plant, 2).artifact("model.onnx")
    with plant.serving():
        plant.publish(plant.folder / "bundle-2")
        flip_byte(plant.state / "store" / model.sha256[:2] / model.sha256, model.bytes // 2)
        with still_serving(device, plant):
            why = refused(device, TRUST, "TrustError", "downloading")
        assert "model.onnx" in why
        assert "differs from the signed digest" in why
        assert plant.run("fleet", "show", "cam-1")["lines"][LINE]["phase"] == "rejected"
        goes_on(plant, device, 3)


def test_a_changed_manifest_is_refused(plant, device) -> None:
    bundle(plant, 2)
    with plant.serving():
        plant.publish(plant.folder / "bundle-2")
        (manifest,) = (plant.state / "repository" / "targets" / "lines" / LINE).glob("*.2.json")
        text = manifest.read_text()
        assert text.count('"scratch"') == 1
        manifest.write_text(text.replace('"scratch"', '"scrotch"'))  # as long as it was, and good JSON
        with still_serving(device, plant):
            why = refused(device, TRUST, "TrustError", "fetching")
        assert "differs from its signed digest" in why


def test_metadata_with_a_prolonged_life_is_refused(plant, device) -> None:
    bundle(plant, 2)
    with plant.serving():
        plant.publish(plant.folder / "bundle-2")
        timestamp = plant.state / "repository" / "metadata" / "timestamp.json"
        text = timestamp.read_text()
        assert text.count('"expires":"2') == 1
        timestamp.write_text(text.replace('"expires":"2', '"expires":"3'))
        with still_serving(device, plant):
            why = refused(device, TRUST, "TrustError", "fetching")
        assert "without enough valid signatures" in why


def test_rolled_back_metadata_is_refused(plant, device) -> None:
    metadata, older = plant.state / "repository" / "metadata", plant.folder / "metadata-of-version-1"
    shutil.copytree(metadata, older)
    bundle(plant, 2)
    with plant.serving():
        plant.publish(plant.folder / "bundle-2")
        code, line = device.once()
        assert (code, line["phase"], line["slot"]) == (0, "active", "b"), line
        newer = metadata.rename(plant.folder / "metadata-of-version-2")
        shutil.copytree(older, metadata)
        plant.publish(plant.folder / "bundle-1")  # the model of then, with the signatures of then
        with still_serving(device, plant):
            code, line = device.once()
        error = line["error"]
        assert (code, line["phase"], error["kind"], error["phase"]) == (TRUST, "rejected", "TrustError", "fetching")
        assert "rollback" in error["message"]
        assert line["slot"] == "b"
        shutil.rmtree(metadata)
        newer.rename(metadata)


def test_expired_metadata_is_refused_until_it_is_renewed(plant, device) -> None:
    bundle(plant, 2)
    past = (sys.executable, server_of_the_past.__file__, plant.state, 400, plant.folder / "bundle-2", LINE)
    with plant.serving(*past), still_serving(device, plant):
        assert "expired metadata was refused" in refused(device, TRUST, "TrustError", "fetching")
    with plant.serving():  # renews what is due by itself
        goes_on(plant, device, 3)


def test_a_broker_that_is_not_there_is_named_in_time(plant, device) -> None:
    started = time.monotonic()
    with still_serving(device, plant):
        code, answer = device.run("run", "--once", "--timeout", 2)
    error = answer["error"]
    assert (code, error["kind"], error["code"]) == (NETWORK, "NetworkError", NETWORK)
    assert f"127.0.0.1:{plant.port}" in error["what"]
    assert error["next"]
    assert time.monotonic() - started < 30


def test_a_device_without_a_runtime_refuses_before_it_downloads(plant, device) -> None:
    hidden = plant.folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(WITHOUT_RUNTIMES)
    without = {"PYTHONPATH": str(hidden)}
    bundle(plant, 2)
    with plant.serving():
        plant.publish(plant.folder / "bundle-2")
        with still_serving(device, plant):
            code, line = device.once(env=without)
            error = line["error"]
            seen = (code, line["phase"], error["kind"], error["phase"])
            assert seen == (RUNTIME, "rejected", "RuntimeUnavailableError", "fetching"), line
            assert "installed here: none" in error["message"]
            assert not list((device.state / "lines" / LINE / "b").glob("model*"))
            code, answer = device.run("predict", "--line", LINE, plant.folder / "frames.npy", env=without)
            assert (code, answer["error"]["kind"]) == (RUNTIME, "RuntimeUnavailableError")
            assert "pip install" in answer["error"]["next"]
        goes_on(plant, device, 3)
