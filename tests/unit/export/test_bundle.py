from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kiridashi.artifacts import describe_file, read_bundle
from kiridashi.budget import Budget
from kiridashi.errors import BundleError
from kiridashi.manifest import Manifest, Preprocessing
from kiridashi_server.export.bundle import BundleFile, Probe, write_bundle
from kiridashi_server.export.npz import deterministic_npz

DRAFT = Manifest(
    line="press-3",
    version=1,
    task="tiles",
    labels=("a", "b"),
    backbone="tiny",
    backbone_fingerprint="0" * 64,
    layout_digest="0" * 64,
    plan_digest="0" * 64,
    parameters_dense=10,
    parameters_kept=5,
    preprocessing=Preprocessing(2, 2, (0.5,) * 3, (0.5,) * 3),
    budget=Budget(),
    artifacts=(),
)
PROBE = Probe(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), {"model.onnx": np.eye(2, dtype=np.float32)})


@pytest.fixture
def files(tmp_path: Path) -> list[BundleFile]:
    model, state = tmp_path / "model.onnx", tmp_path / "state.npz"
    model.write_bytes(b"a model")
    deterministic_npz(state, {"head.bias": np.zeros(2, np.float32)})
    return [
        BundleFile(model, describe_file(model, "onnx-fp32")),
        BundleFile(state, describe_file(state, "train-state")),
    ]


def test_a_bundle_is_complete_and_reads_back(tmp_path: Path, files: list[BundleFile]) -> None:
    folder = tmp_path / "out" / "bundle"
    manifest = write_bundle(folder, DRAFT, files, PROBE)
    assert read_bundle(folder) == manifest
    assert [artifact.name for artifact in manifest.artifacts] == ["model.onnx", "state.npz", "probe.npz"]
    with np.load(folder / "probe.npz", allow_pickle=False) as probe:
        assert sorted(probe.files) == ["images", "logits.model.onnx"]
        assert np.array_equal(probe["images"], PROBE.images)
        assert np.array_equal(probe["logits.model.onnx"], PROBE.logits["model.onnx"])
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, files: list[BundleFile]) -> None:
    write_bundle(tmp_path / "one", DRAFT, files, PROBE)
    write_bundle(tmp_path / "two", DRAFT, files, PROBE)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_a_killed_run_left_does_not_disturb(tmp_path: Path, files: list[BundleFile]) -> None:
    leftover = tmp_path / ".bundle.partial"
    leftover.mkdir()
    (leftover / "old").write_bytes(b"x")
    write_bundle(tmp_path / "bundle", DRAFT, files, PROBE)
    assert not leftover.exists()
    assert not (tmp_path / "bundle" / "old").exists()


def test_refuses_an_existing_folder_and_leaves_it_alone(tmp_path: Path, files: list[BundleFile]) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    with pytest.raises(BundleError, match="there already"):
        write_bundle(folder, DRAFT, files, PROBE)
    assert list(folder.iterdir()) == []


def test_refuses_a_changed_file(tmp_path: Path, files: list[BundleFile]) -> None:
    files[0].path.write_bytes(b"b model")
    with pytest.raises(BundleError, match="is not the file"):
        write_bundle(tmp_path / "bundle", DRAFT, files, PROBE)
    assert not (tmp_path / "bundle").exists()


def test_refuses_a_probe_without_a_models_outputs(tmp_path: Path, files: list[BundleFile]) -> None:
    with pytest.raises(BundleError, match="probe has outputs"):
        write_bundle(tmp_path / "bundle", DRAFT, files, Probe(PROBE.images, {}))


def test_refuses_what_a_device_would_refuse(tmp_path: Path, files: list[BundleFile]) -> None:
    with pytest.raises(BundleError, match="twice"):
        write_bundle(tmp_path / "bundle", DRAFT, [*files, files[1]], PROBE)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_npz_reads_without_pickle_and_refuses_objects(tmp_path: Path) -> None:
    arrays = {"b.weight": np.ones((2, 3), np.float32).T, "a": np.array(3, np.int64)}
    deterministic_npz(tmp_path / "a.npz", arrays)
    deterministic_npz(tmp_path / "b.npz", dict(reversed(arrays.items())))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert np.array_equal(loaded["b.weight"], arrays["b.weight"])
        assert loaded["a"].shape == ()
    with pytest.raises(ValueError, match="Object arrays"):
        deterministic_npz(tmp_path / "c.npz", {"a": np.array([{}])})
    assert not (tmp_path / "c.npz").exists()
