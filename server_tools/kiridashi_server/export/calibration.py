"""Calibration images: what ranges, parity and the probe are taken from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from kiridashi.errors import InputError
from kiridashi.manifest import Preprocessing
from kiridashi.preprocess import to_input
from numpy.typing import NDArray

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError

Float32 = NDArray[np.float32]
_BATCH = 32


@dataclass(frozen=True)
class Calibration:
    """Images and what the torch model says of them.

    Attributes:
        images: uint8 [n, H, W, 3], RGB.
        inputs: the preprocessed images, float32 [n, 3, H, W].
        logits: float32 [n, classes].
        features: float32 [n, D].
        logit_terms: the largest ``|bias_c| + sum_d |weight_cd feature_nd|`` over images and classes: what a
            logit is summed from, and so what its rounding error is proportional to, also where large terms
            cancel (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
    """

    images: NDArray[np.uint8]
    inputs: Float32
    logits: Float32
    features: Float32
    logit_terms: float


def preprocess(images: NDArray[np.uint8], preprocessing: Preprocessing) -> Float32:
    """Images of the model's own size as a device prepares them: uint8 [n, H, W, 3] -> float32 [n, 3, H, W].

    Raises:
        InputError: no image, or another dtype or shape than ``preprocessing`` states.
    """
    wanted = (preprocessing.height, preprocessing.width, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted or not len(images):
        raise InputError(
            f"calibration images are {images.dtype} {images.shape}",
            why=f"the model takes uint8 images [n, {wanted[0]}, {wanted[1]}, 3], at least one",
        )
    return to_input(images, preprocessing, "NCHW")


def calibrate(model: Classifier, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Calibration:
    """Run ``model`` over the images.

    Raises:
        InputError: the images do not fit the preprocessing.
        ExportError: an output is not a finite number.
    """
    inputs = preprocess(images, preprocessing)
    pieces = []
    with torch.no_grad():
        for start in range(0, len(inputs), _BATCH):
            pieces.append(model.forward_with_features(torch.from_numpy(inputs[start : start + _BATCH])))
    logits = torch.cat([piece[0] for piece in pieces]).numpy()
    features = torch.cat([piece[1] for piece in pieces]).numpy()
    if not (np.isfinite(logits).all() and np.isfinite(features).all()):
        raise ExportError(
            "the model gives values that are not finite on the calibration images",
            next_step="check the model's weights, or the mean and std of the preprocessing",
        )
    weight = model.head.weight.detach().abs().numpy()
    terms = np.abs(features) @ weight.T + model.head.bias.detach().abs().numpy()
    return Calibration(images, inputs, logits, features, float(terms.max()))
