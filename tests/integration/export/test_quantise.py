from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from kiridashi.manifest import Preprocessing
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.artifacts import ExportResult
from kiridashi_server.export.calibration import Calibration, calibrate
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.parity import run_artifact
from kiridashi_server.export.quantise import quantise_onnx, quantise_tflite
from numpy.typing import NDArray


@pytest.fixture
def calibration(classifier: Classifier, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Calibration:
    return calibrate(classifier, images, preprocessing)


def test_no_value_saturates_whatever_the_order_of_the_images(
    exported: ExportResult, calibration: Calibration, tmp_path: Path
) -> None:
    brightest_last = np.argsort(calibration.logits.max(1))
    written = []
    for name, order in (("up", brightest_last), ("down", brightest_last[::-1])):
        path = tmp_path / f"{name}.tflite"
        ordered = dataclasses.replace(calibration, inputs=calibration.inputs[order])
        quantise_tflite(exported.folder / "model.tflite", path, ordered)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    difference = np.abs(run_artifact(tmp_path / "up.tflite", calibration.inputs) - calibration.logits)
    assert difference.max() < 0.02 * np.abs(calibration.logits).max()


def test_a_file_that_cannot_be_quantised_is_named(tmp_path: Path, calibration: Calibration) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot quantise broken\.onnx"):
        quantise_onnx(tmp_path / "broken.onnx", tmp_path / "out.onnx", calibration)
    with pytest.raises(ExportError, match=r"cannot quantise broken\.tflite"):
        quantise_tflite(tmp_path / "broken.tflite", tmp_path / "out.tflite", calibration)
    assert not list(tmp_path.glob("out.*"))
