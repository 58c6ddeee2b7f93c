from __future__ import annotations

import numpy as np
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi.manifest import Parity, Preprocessing
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.calibration import Calibration, calibrate, preprocess
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.parity import compare, objection

PREPROCESSING = Preprocessing(height=2, width=3, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))


def test_preprocessing_is_per_channel_and_channels_first() -> None:
    images = np.full((1, 2, 3, 3), 255, np.uint8)
    inputs = preprocess(images, PREPROCESSING)
    assert inputs.shape == (1, 3, 2, 3)
    assert inputs.dtype == np.float32
    assert np.allclose(inputs[0, :, 0, 0], [1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 2, 3, 3), np.float32),
        np.zeros((1, 3, 2, 3), np.uint8),
        np.zeros((0, 2, 3, 3), np.uint8),
        np.zeros((2, 3, 3), np.uint8),
    ],
)
def test_preprocessing_refuses_other_images(images: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match="calibration images"):
        preprocess(images, PREPROCESSING)


def test_calibration_runs_the_model_over_more_than_one_batch(classifier: Classifier) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 2, 3, 3), np.uint8)
    calibration = calibrate(classifier, images, PREPROCESSING)
    assert np.allclose(calibration.features, calibration.inputs.mean((2, 3)), atol=1e-6)
    with torch.no_grad():
        expected = classifier(torch.from_numpy(calibration.inputs)).numpy()
    assert np.allclose(calibration.logits, expected, atol=1e-6)
    assert calibration.logit_terms >= np.abs(calibration.logits).max()


def test_a_model_that_is_not_finite_is_refused(classifier: Classifier) -> None:
    with torch.no_grad():
        classifier.head.bias[0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        calibrate(classifier, np.zeros((1, 2, 3, 3), np.uint8), PREPROCESSING)


def calibration_of(logits: np.ndarray, terms: float) -> Calibration:  # type: ignore[type-arg]
    nothing = np.zeros(0, np.float32)
    return Calibration(np.zeros(0, np.uint8), nothing, logits.astype(np.float32), nothing, terms)


def test_compare_measures_difference_agreement_and_tolerance() -> None:
    expected = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    got = np.array([[0.0, 1.0], [0.9, 1.0], [2.0, 0.0], [0.0, 3.0]], np.float32)
    parity = compare(calibration_of(expected, 50.0), got, "onnx-fp32")
    assert parity.max_abs_diff == pytest.approx(1.0)
    assert parity.top1_agreement == 0.75
    assert parity.tolerance == pytest.approx(1e-5 * 50)


def test_compare_refuses_values_that_are_not_finite_or_of_another_shape() -> None:
    calibration = calibration_of(np.zeros((2, 2)), 1.0)
    with pytest.raises(ExportError, match="no usable logits"):
        compare(calibration, np.full((2, 2), np.nan, np.float32), "onnx-int8")
    with pytest.raises(ExportError, match="no usable logits"):
        compare(calibration, np.zeros((2, 3), np.float32), "onnx-int8")


def test_objections_name_the_limit() -> None:
    assert objection(Parity(1e-6, 1.0, 1e-5), 0.9) == ""
    assert "differ by up to 0.1" in objection(Parity(0.1, 1.0, 1e-5), 0.9)
    assert "80.0%" in objection(Parity(1e-6, 0.8, 1e-5), 0.9)
