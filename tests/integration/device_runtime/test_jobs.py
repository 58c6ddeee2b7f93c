from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from kiridashi.artifacts import MANIFEST_NAME, describe_file, read_bundle
from kiridashi.budget import MIB, Budget, judge
from kiridashi.errors import BundleError, InputError, RuntimeUnavailableError
from kiridashi.manifest import Manifest
from kiridashi.samples import write_samples
from kiridashi_agent.jobs import AccuracyRequest, MeasureRequest, ProbeRequest, check_accuracy, measure, probe
from kiridashi_agent.process import Limits, MemoryLimitError
from onnx import numpy_helper

from tests.assets.tiny_bundle import server_tiles
from tests.integration.device_runtime.conftest import Device

QUICK = {"runs": 20, "max_runs": 50, "seconds": 0.2}


def rewrite_probe(folder: Path, **changes: np.ndarray) -> None:
    """Change arrays of the probe, and the manifest with them: a bundle whose probe is honest but different."""
    with np.load(folder / "probe.npz") as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(folder / "probe.npz", **{name: value for name, value in arrays.items() if value.size})
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
    entry = describe_file(folder / "probe.npz", "probe")
    artifacts = tuple(entry if old.name == "probe.npz" else old for old in manifest.artifacts)
    (folder / "manifest.json").write_bytes(msgspec.structs.replace(manifest, artifacts=artifacts).encode())


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx", "model.tflite"])
def test_probe_accepts_what_was_exported(bundle: Path, name: str) -> None:
    report = probe(ProbeRequest(str(bundle), name))
    assert report.images == 12
    assert report.top1_agreement == 1.0
    assert report.max_abs_diff < 1e-4 < report.tolerance


def test_probe_refuses_other_outputs(bundle: Path) -> None:
    with np.load(bundle / "probe.npz") as file:
        wrong = file["logits.model.onnx"] + np.float32(0.05)
    rewrite_probe(bundle, **{"logits.model.onnx": wrong})
    with pytest.raises(BundleError, match=r"logits differ by up to 0\.05"):
        probe(ProbeRequest(str(bundle), "model.onnx"))
    assert probe(ProbeRequest(str(bundle), "model.tflite")).top1_agreement == 1.0


def test_probe_refuses_a_changed_byte_and_a_missing_probe(bundle: Path) -> None:
    rewrite_probe(bundle, **{"logits.model.tflite": np.zeros(0)})
    with pytest.raises(BundleError, match=r"no outputs for 'model\.tflite'"):
        probe(ProbeRequest(str(bundle), "model.tflite"))
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="not the file that the manifest lists"):
        probe(ProbeRequest(str(bundle), "model.onnx"))
    with pytest.raises(BundleError, match="no artifact 'other'"):
        probe(ProbeRequest(str(bundle), "other"))


@pytest.mark.parametrize(("name", "runtime"), [("model.onnx", "onnxruntime "), ("model.tflite", "ai-edge-litert ")])
def test_measurement_is_of_a_process_of_its_own(bundle: Path, name: str, runtime: str) -> None:
    measured = measure(MeasureRequest(str(bundle), name, **QUICK), Limits(60, memory_bytes=400 * MIB))
    assert measured.runtime.startswith(runtime)
    assert measured.file_bytes == read_bundle(bundle).artifact(name).bytes
    # An interpreter with numpy and a runtime needs tens of MiB; this test process, which holds torch, needs hundreds.
    assert 20 * MIB < measured.memory_bytes < 150 * MIB
    assert 0 < measured.latency_p50_ms <= measured.latency_p95_ms <= measured.latency_p99_ms < 100
    assert 20 <= measured.runs <= 50
    assert measured.load_ms > 0
    assert measured.memory_limit in ("cgroup", "rlimit")
    assert judge(Budget(memory_bytes=1 * MIB), measured).exceeded == ("memory",)


def test_measuring_a_file_without_a_bundle(bundle: Path, tmp_path: Path) -> None:
    measured = measure(MeasureRequest(str(bundle / "model.tflite")))
    assert measured.runs >= 100
    assert measured.memory_limit == "none"
    with pytest.raises(InputError, match="does not exist"):
        measure(MeasureRequest(str(tmp_path / "none.onnx")))
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(BundleError, match=r"cannot load bad\.onnx"):
        measure(MeasureRequest(str(tmp_path / "bad.onnx")))


def test_memory_limit_is_told_apart_from_other_failures(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kiridashi_agent import process
    from kiridashi_agent.cage import OpenCage

    monkeypatch.setattr(process, "open_cage", lambda _: OpenCage("rlimit"))
    request = MeasureRequest(str(bundle), "model.onnx", **QUICK)
    assert measure(request, Limits(60, memory_bytes=120 * MIB)).memory_limit == "rlimit"
    for limit in (40, 15):
        with pytest.raises(MemoryLimitError, match=f"{limit} MiB"):
            measure(request, Limits(60, memory_bytes=limit * MIB))


def test_a_runtime_that_does_not_import_is_explained(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "onnxruntime"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libsomething.so.1: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent), prepend=":")
    with pytest.raises(RuntimeUnavailableError, match=r"libsomething\.so\.1") as caught:
        probe(ProbeRequest(str(bundle), "model.onnx"))
    assert "'model.tflite'" in caught.value.next_step


def accuracy(device: Device, artifact: str, samples: Path | str = "", **fields: object):
    """The check of an artifact in the device's slot a, by a child process."""
    request = AccuracyRequest(
        str(device.state_dir), "press-3", str(device.slots.folder("a")), artifact, str(samples), **fields
    )
    return check_accuracy(request)


def test_accuracy_is_judged_on_the_devices_hold_out(device: Device) -> None:
    check = accuracy(device, "model.int8.onnx", device.samples)
    assert (check.basis, check.reference, check.samples, check.passed) == ("holdout", "model.onnx", 8, True)
    assert "of 8 hold-out frames right" in check.reason


def test_without_labels_it_is_agreement_with_the_float_file_on_the_probe(device: Device, tmp_path: Path) -> None:
    check = accuracy(device, "model.int8.onnx")
    assert (check.basis, check.samples, check.drop, check.passed) == ("probe", 12, 0.0, True)
    assert "no hold-out on this device" in check.reason
    (tmp_path / "empty").mkdir()
    assert "holds no samples" in accuracy(device, "model.int8.onnx", tmp_path / "empty").reason


def test_a_file_that_lost_its_accuracy_is_found_out_on_either_basis(device: Device, tmp_path: Path) -> None:
    spoilt = spoil(device, "model.int8.onnx")
    # Of the eight frames of the device's own hold-out even the float file gets half wrong: too few to tell.
    assert "the hold-out is too small" in accuracy(device, spoilt, device.samples).reason
    images, labels = server_tiles(20, 3)
    write_samples(tmp_path / "many" / "all.npz", images, labels, np.ones(len(labels), np.bool_))
    for samples, basis in ((tmp_path / "many", "holdout"), (device.samples, "probe"), ("", "probe")):
        check = accuracy(device, spoilt, samples)
        assert (check.basis, check.passed) == (basis, False), check
        assert check.drop > 0.4
        assert "chance does not explain" in check.reason
        assert accuracy(device, spoilt, samples, max_drop=1.0).passed


def spoil(device: Device, name: str) -> str:
    """Turn the head's first bias up in an int8 file until one class wins always, and have the manifest list it so."""
    folder = device.slots.folder("a")
    model = onnx.load(folder / name)
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "head.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.array([1e3, 0, 0, 0], np.float32), "head.bias"))
    onnx.save(model, folder / name)
    artifacts = [
        msgspec.structs.replace(describe_file(folder / name, entry.kind), input_layout=entry.input_layout)
        if entry.name == name
        else entry
        for entry in device.manifest.artifacts
    ]
    manifest = msgspec.structs.replace(device.manifest, artifacts=tuple(artifacts))
    (folder / MANIFEST_NAME).write_bytes(manifest.encode())
    return name


def test_hardware_can_be_declared(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIRIDASHI_HARDWARE", "emulated")
    assert measure(MeasureRequest(str(bundle), "model.tflite", **QUICK)).hardware == "emulated"
