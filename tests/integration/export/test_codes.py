"""Smaller files with other parameters: what is written there is what the server's quantiser makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from kiridashi.manifest import Artifact, Code, Preprocessing
from kiridashi.recode import decode, recode
from kiridashi_server.classifier import Classifier
from kiridashi_server.export import codes as codes_module
from kiridashi_server.export import quantise
from kiridashi_server.export.artifacts import ExportResult, ExportSettings, export_artifacts
from kiridashi_server.export.calibration import calibrate, preprocess
from kiridashi_server.export.parity import run_artifact
from kiridashi_server.export.patches import with_parameters, write_parameters
from kiridashi_server.export.quantise import quantise_onnx, quantise_tflite, tflite_float16
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("onnx-int8", "tflite-int8", "tflite-fp16")
Values = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
) -> ExportResult:
    """Exported with all parameters tunable, as a bundle is."""
    folder = tmp_path_factory.mktemp("codes") / "all"
    return export_artifacts(classifier, example, images, preprocessing, parameters_of(classifier), folder)


def parameters_of(classifier: Classifier) -> Values:
    return {name: value.detach().numpy().copy() for name, value in classifier.named_parameters()}


@pytest.fixture(scope="module")
def tuned(classifier: Classifier) -> Values:
    """What a tuning makes of them: every weight moves a little, zeros too."""
    rng = np.random.default_rng(5)
    return {
        name: (value + rng.normal(0, 0.05 + 0.05 * np.abs(value).max(), value.shape)).astype(np.float32)
        for name, value in parameters_of(classifier).items()
    }


def artifact(result: ExportResult, kind: str) -> Artifact:
    return next(one for one in result.artifacts if one.kind == kind)


def recoded(result: ExportResult, kind: str, values: Values, path: Path) -> bytes:
    found = artifact(result, kind)
    write_parameters(result.folder / found.name, path, found.patches, values)
    return recode(path.read_bytes(), found.coded, values, found.name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_place(whole: ExportResult, classifier: Classifier, kind: str) -> None:
    assert artifact(whole, kind).tunable == set(parameters_of(classifier))
    assert not whole.unlocated


@pytest.mark.parametrize("kind", KINDS)
def test_so_have_biases_whose_weights_are_not_tunable(exported: ExportResult, tunable: Values, kind: str) -> None:
    assert artifact(exported, kind).tunable == set(tunable)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_values_written_anew_give_the_shipped_file(
    whole: ExportResult, classifier: Classifier, kind: str, tmp_path: Path
) -> None:
    shipped = (whole.folder / artifact(whole, kind).name).read_bytes()
    again = recoded(whole, kind, parameters_of(classifier), tmp_path / "again")
    different = np.flatnonzero(np.frombuffer(shipped, np.uint8) != np.frombuffer(again, np.uint8))
    assert len(different) <= 0.001 * len(shipped)


@pytest.mark.parametrize("kind", KINDS)
def test_tuned_values_give_what_the_quantiser_makes_of_them(
    whole: ExportResult,
    classifier: Classifier,
    tuned: Values,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = artifact(whole, kind)
    floats = artifact(whole, "onnx-fp32" if kind.startswith("onnx") else "tflite-fp32")
    source, theirs = tmp_path / floats.name, tmp_path / found.name
    write_parameters(whole.folder / floats.name, source, floats.patches, tuned)
    calibration = calibrate(with_parameters(classifier, tuned), images, preprocessing)
    if kind == "onnx-int8":
        same = tuple(recipe for recipe in quantise.ONNX_RECIPES if recipe.name == whole.recipes[kind])
        monkeypatch.setattr(quantise, "ONNX_RECIPES", same)
        quantise_onnx(source, theirs, calibration)
    elif kind == "tflite-int8":
        quantise_tflite(source, theirs, calibration)
    else:
        tflite_float16(source, theirs)
    ours = recoded(whole, kind, tuned, tmp_path / "ours")
    written = theirs.read_bytes()
    assert len(ours) == len(written)
    for code in found.coded:
        mine, other = decode(ours, code, "ours"), decode(written, code, "theirs")
        if code.dtype == "int32":  # their steps are other ones: the input's range is that of the tuned network
            steps = np.frombuffer(ours, "<f4", code.channels, code.scales)
            assert (np.abs(mine - tuned[code.parameter]) <= 0.51 * steps).all()
        else:
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_with_the_tuned_values(
    whole: ExportResult,
    classifier: Classifier,
    tuned: Values,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    kind: str,
    tmp_path: Path,
) -> None:
    found = artifact(whole, kind)
    inputs = preprocess(images, preprocessing)
    with torch.no_grad():
        expected = with_parameters(classifier, tuned)(torch.from_numpy(inputs)).numpy()
    path = tmp_path / found.name
    path.write_bytes(recoded(whole, kind, tuned, tmp_path / "raw"))
    computed = run_artifact(path, inputs)
    off, shipped = np.abs(computed - expected), np.abs(run_artifact(whole.folder / found.name, inputs) - expected)
    assert off.mean() < 0.03 * np.abs(expected).max()
    assert off.mean() < 0.2 * shipped.mean()


def test_a_bias_that_the_quantiser_clipped_is_mended(
    whole: ExportResult,
    classifier: Classifier,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tmp_path: Path,
) -> None:
    values = parameters_of(classifier)
    values["features.depthwise.weight"][3] *= 1e-9  # nearly dead: its scale is tiny, and its bias does not fit int32
    values["features.depthwise.bias"][3] = 4.0
    floats, path = artifact(whole, "tflite-fp32"), tmp_path / "int8.tflite"
    write_parameters(whole.folder / floats.name, tmp_path / "fp32.tflite", floats.patches, values)
    calibration = calibrate(with_parameters(classifier, values), images, preprocessing)
    quantise_tflite(tmp_path / "fp32.tflite", path, calibration)
    before = np.abs(run_artifact(path, calibration.inputs) - calibration.logits).mean()
    assert codes_module.mend_tflite(path, values) == ("features.depthwise.bias",)
    codes = codes_module.tflite_codes(path, values, values)
    assert {code.parameter for code in codes} == set(values)
    bias = next(code for code in codes if code.parameter == "features.depthwise.bias")
    np.testing.assert_allclose(decode(path.read_bytes(), bias, path.name), values[bias.parameter], atol=1e-3)
    assert np.abs(run_artifact(path, calibration.inputs) - calibration.logits).mean() < 0.5 * before
    assert codes_module.mend_tflite(path, values) == ()


def test_a_quantiser_that_works_in_another_way_costs_the_parameter_its_place(
    classifier: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def twice(data: bytes, codes: Sequence[Code], values: Values, source: str) -> bytes:
        return recode(data, codes, {name: 2 * value for name, value in values.items()}, source)

    monkeypatch.setattr(codes_module, "recode", twice)
    settings = dataclasses.replace(ExportSettings(), kinds=("onnx-fp32", "onnx-int8"))
    result = export_artifacts(
        classifier, example, images, preprocessing, parameters_of(classifier), tmp_path / "out", settings
    )
    assert artifact(result, "onnx-int8").coded == ()
    assert set(result.unlocated["onnx-int8"]) == set(parameters_of(classifier))
