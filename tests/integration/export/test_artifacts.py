from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from kiridashi.artifacts import read_bundle
from kiridashi.budget import Budget
from kiridashi.errors import InputError
from kiridashi.manifest import Manifest, Preprocessing
from kiridashi_server.classifier import Classifier
from kiridashi_server.export import artifacts as module
from kiridashi_server.export.artifacts import ALL_KINDS, ExportResult, ExportSettings, export_artifacts
from kiridashi_server.export.bundle import write_bundle
from kiridashi_server.export.calibration import preprocess
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.onnx import export_onnx
from kiridashi_server.export.parity import run_artifact
from kiridashi_server.export.patches import with_parameters, write_parameters
from numpy.typing import NDArray
from torch import Tensor

Tunable = dict[str, NDArray[np.float32]]
REPOSITORY = Path(__file__).parents[3]
ONNX_ONLY = ExportSettings(kinds=("onnx-fp32",))


def test_every_kind_is_exported_with_parity(exported: ExportResult) -> None:
    assert not exported.dropped
    assert [artifact.kind for artifact in exported.artifacts] == list(ALL_KINDS)
    for artifact in exported.artifacts:
        assert artifact.parity is not None
        assert artifact.parity.max_abs_diff <= artifact.parity.tolerance
        assert artifact.parity.top1_agreement >= 0.9
        assert artifact.input_layout == ("NCHW" if artifact.name.endswith(".onnx") else "NHWC")
    parity = {artifact.kind: artifact.parity.max_abs_diff for artifact in exported.artifacts if artifact.parity}
    assert parity["onnx-fp32"] < 1e-4 < parity["onnx-int8"]
    assert parity["tflite-fp32"] < 1e-4 < parity["tflite-int8"]
    assert set(exported.seconds) == set(ALL_KINDS)
    assert exported.recipes["onnx-int8"] in {"u8s8-reduced", "s8s8"}


def test_smaller_forms_are_smaller(exported: ExportResult) -> None:
    size = {artifact.kind: artifact.bytes for artifact in exported.artifacts}
    assert size["tflite-fp16"] < size["tflite-fp32"]
    weights = onnx.load(exported.folder / "model-int8.onnx").graph.initializer
    assert any(weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 4 for weight in weights)


def test_onnx_names_are_the_parameters_names_and_the_batch_is_open(
    exported: ExportResult, classifier: Classifier
) -> None:
    graph = onnx.load(exported.folder / "model.onnx").graph
    assert set(dict(classifier.named_parameters())) <= {tensor.name for tensor in graph.initializer}
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["logits", "features"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("kind", ["onnx-fp32", "tflite-fp32", "tflite-fp16"])
def test_patched_files_compute_what_torch_computes_with_the_new_values(
    exported: ExportResult,
    classifier: Classifier,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tunable: Tunable,
    kind: str,
    tmp_path: Path,
) -> None:
    artifact = next(artifact for artifact in exported.artifacts if artifact.kind == kind)
    assert {patch.parameter for patch in artifact.patches} == set(tunable)
    rng = np.random.default_rng(7)
    values = {name: rng.normal(0, 0.5, old.shape).astype(np.float32) for name, old in tunable.items()}
    inputs = preprocess(images, preprocessing)
    with torch.no_grad():
        expected = with_parameters(classifier, values)(torch.from_numpy(inputs)).numpy()

    patched = tmp_path / artifact.name
    write_parameters(exported.folder / artifact.name, patched, artifact.patches, values)

    difference = np.abs(run_artifact(patched, inputs) - expected).max()
    assert difference < (2e-2 if kind.endswith("fp16") else 1e-4)
    assert np.abs(run_artifact(exported.folder / artifact.name, inputs) - expected).max() > 0.1


def test_int8_files_have_no_patches(exported: ExportResult) -> None:
    assert all(not artifact.patches for artifact in exported.artifacts if artifact.kind.endswith("int8"))
    assert not exported.unlocated


def test_files_hold_no_paths_of_this_machine(exported: ExportResult) -> None:
    for artifact in exported.artifacts:
        data = (exported.folder / artifact.name).read_bytes()
        for trace in (str(REPOSITORY), str(exported.folder.parent), 'File "', "site-packages"):
            assert trace.encode() not in data, (artifact.name, trace)


def test_two_exports_give_two_identical_bundles(
    exported: ExportResult,
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tunable: Tunable,
    tmp_path: Path,
) -> None:
    again = export_artifacts(classifier, example, images, preprocessing, tunable, tmp_path / "again")
    draft = Manifest(
        line="press-3",
        version=1,
        task="colours",
        labels=("a", "b", "c", "d", "e"),
        backbone="tiny",
        backbone_fingerprint="0" * 64,
        layout_digest="0" * 64,
        plan_digest="0" * 64,
        parameters_dense=1,
        parameters_kept=1,
        preprocessing=preprocessing,
        budget=Budget(),
        artifacts=(),
    )
    one = write_bundle(tmp_path / "one", draft, exported.files, exported.probe)
    two = write_bundle(tmp_path / "two", draft, again.files, again.probe)
    assert one.digest == two.digest
    assert read_bundle(tmp_path / "one") == one
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == len(ALL_KINDS) + 2
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    probe = np.load(tmp_path / "one" / "probe.npz", allow_pickle=False)
    inputs = preprocess(probe["images"], preprocessing)
    for artifact in one.artifacts:
        if artifact.runtime:
            logits = run_artifact(tmp_path / "one" / artifact.name, inputs)
            assert np.allclose(logits, probe[f"logits.{artifact.name}"], atol=1e-6)


def test_the_model_is_left_as_it_was_and_nothing_is_printed(
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tunable: Tunable,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = export_artifacts(
        classifier,
        example,
        images,
        preprocessing,
        tunable,
        tmp_path / "out",
        ExportSettings(("onnx-fp32", "onnx-int8")),
    )
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    now = dict(classifier.named_parameters())
    assert all(np.array_equal(now[name].detach().numpy(), values) for name, values in tunable.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in result.folder.iterdir()) == ["model-int8.onnx", "model.onnx"]


def test_a_float32_file_that_computes_something_else_is_refused(
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def faulty(model: Classifier, example: Tensor, path: Path) -> None:
        weight = model.head.weight.detach().numpy() * np.float32(1.01)
        export_onnx(with_parameters(model, {"head.weight": weight}), example, path)

    monkeypatch.setattr(module, "export_onnx", faulty)
    with pytest.raises(ExportError, match=r"onnx-fp32 .* does not compute .* logits differ"):
        export_artifacts(classifier, example, images, preprocessing, {}, tmp_path / "out", ONNX_ONLY)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_int8_file_that_disagrees_is_left_out_with_the_reason(
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def faulty(source: Path, target: Path, calibration: object) -> None:
        weight = classifier.head.weight.detach().numpy()[::-1].copy()
        export_onnx(with_parameters(classifier, {"head.weight": weight}), example, target)

    monkeypatch.setattr(module, "quantise_onnx", faulty)
    settings = ExportSettings(("onnx-fp32", "onnx-int8"))
    result = export_artifacts(classifier, example, images, preprocessing, {}, tmp_path / "out", settings)
    assert [artifact.kind for artifact in result.artifacts] == ["onnx-fp32"]
    assert list(result.dropped) == ["onnx-int8"]
    assert "does not compute" in result.dropped["onnx-int8"]
    assert not (tmp_path / "out" / "model-int8.onnx").exists()
    assert list(result.probe.logits) == ["model.onnx"]


@pytest.mark.parametrize("kinds", [(), ("onnx-fp32", "onnx-fp32"), ("probe",)])
def test_unusable_settings_are_refused_before_anything_is_written(
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tmp_path: Path,
    kinds: tuple[module.ArtifactKind, ...],
) -> None:
    with pytest.raises(InputError, match="cannot export"):
        export_artifacts(classifier, example, images, preprocessing, {}, tmp_path / "out", ExportSettings(kinds))
    assert list(tmp_path.iterdir()) == []
