"""Does an artifact compute what the torch model computes? Measured with the runtime that devices use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kiridashi.errors import KiridashiError
from kiridashi.manifest import ArtifactKind, Parity
from kiridashi.runtime import open_file
from kiridashi.runtime.onnx import load
from kiridashi.runtime.protocol import Provider
from numpy.typing import NDArray

from kiridashi_server.export.calibration import Calibration
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.onnx import OUTPUT_NAMES
from kiridashi_server.export.quiet import quiet_libraries

Float32 = NDArray[np.float32]

RELATIVE_TOLERANCE: dict[str, float] = {
    "onnx-fp32": 1e-5,
    "tflite-fp32": 1e-5,
    "tflite-fp16": 2e-2,
    "onnx-int8": 0.2,
    "tflite-int8": 0.2,
}
"""Accepted difference of the logits per kind, as a share of ``Calibration.logit_terms``.

float32 differs by the order of additions only, which measures about 4e-7; float16 weights carry 11 bits and measure
about 7e-4; for int8 the bound merely refuses nonsense, as what counts there is the agreement of the best class.
"""
_FEATURE_TOLERANCE = 1e-4
# A GPU in the server must not change what the manifest says.
_PROVIDERS: tuple[Provider, ...] = ("xnnpack", "cpu")


def run_artifact(path: Path, inputs: Float32) -> Float32:
    """Logits of an inference artifact, image by image, on one thread.

    Args:
        path: the artifact's file; its suffix decides the runtime.
        inputs: preprocessed images, float32 [n, 3, H, W].

    Returns:
        float32 [n, classes].

    Raises:
        ExportError: the runtime refuses the file.
    """
    try:
        with quiet_libraries():
            model = open_file(path, providers=_PROVIDERS)
            frames = inputs if model.layout == "NCHW" else np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
            return np.concatenate([model.run(frames[n : n + 1]) for n in range(len(frames))])
    except KiridashiError as error:
        raise ExportError(f"the runtime cannot run {path.name}", why=str(error)) from error


def compare(calibration: Calibration, logits: Float32, kind: ArtifactKind) -> Parity:
    """Largest difference from the torch model's logits, and agreement of the best class.

    The tolerance follows ``RELATIVE_TOLERANCE``.

    Raises:
        ExportError: the shapes differ, or a logit is not finite.
    """
    expected = calibration.logits
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        raise ExportError(
            f"the {kind} artifact gives no usable logits",
            why=f"their shape is {logits.shape} instead of {expected.shape}, or they are not finite",
        )
    return Parity(
        max_abs_diff=float(np.abs(logits - expected).max()),
        top1_agreement=float((logits.argmax(1) == expected.argmax(1)).mean()),
        tolerance=RELATIVE_TOLERANCE[kind] * calibration.logit_terms,
    )


def objection(parity: Parity, min_top1_agreement: float) -> str:
    """Why an artifact must not be shipped, or an empty string."""
    if not parity.max_abs_diff <= parity.tolerance:
        return f"its logits differ by up to {parity.max_abs_diff:.3g}, allowed are {parity.tolerance:.3g}"
    if parity.top1_agreement < min_top1_agreement:
        return (
            f"it agrees with the model on {parity.top1_agreement:.1%} of the calibration images, "
            f"wanted are {min_top1_agreement:.1%}"
        )
    return ""


def check_batch(path: Path, calibration: Calibration) -> None:
    """Check both outputs of the float32 ONNX file on all images as one batch, as the head's fit uses it.

    Raises:
        ExportError: a difference beyond the tolerance (for features, 1e-4 of the largest).
    """
    with quiet_libraries():
        logits, features = load(path, 1, _PROVIDERS).run_outputs(calibration.inputs, OUTPUT_NAMES)
    why = objection(compare(calibration, logits, "onnx-fp32"), 0.0)
    difference = np.abs(features - calibration.features).max()
    if difference > _FEATURE_TOLERANCE * np.abs(calibration.features).max():
        why = why or f"its features differ by up to {difference:.3g}"
    if why:
        raise ExportError(f"{path.name} is wrong for a batch of images", why=why)
