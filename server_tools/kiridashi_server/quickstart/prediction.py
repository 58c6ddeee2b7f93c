"""A line application's view: predictions through ``LineModel``, and how often they are right."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import msgspec
import numpy as np
from kiridashi import LineModel
from kiridashi.artifacts import read_bundle
from kiridashi.preprocess import to_input
from kiridashi.runtime import open_model
from PIL import Image

from kiridashi_server.report.schema import PredictionEntry
from kiridashi_server.tasks import Task

_SHOWN = 16


class Predicted(msgspec.Struct, frozen=True):
    """Accuracy on the test images as delivered and as active, and a few predictions to look at."""

    accuracy_delivered: float
    accuracy_active: float
    model_digest: str
    predictions: tuple[PredictionEntry, ...]


def predict(task: Task, line: str, bundle: Path, artifact: str, device_dir: Path, seed: int) -> Predicted:
    """Predict the line's test images, as delivered and as active on the device.

    Args:
        task: its ``test`` split is what the line's camera sees.
        line: the line's name.
        bundle: the delivered bundle folder.
        artifact: the file of the bundle that the device activated, tuned or not.
        device_dir: the device's state folder.
        seed: which samples are shown.
    """
    test = task.split("test")
    manifest = read_bundle(bundle)
    delivered = open_model(bundle / artifact, manifest.artifact(artifact))
    logits = [
        delivered.run(to_input(test.images[n : n + 1], manifest.preprocessing, delivered.layout))
        for n in range(len(test))
    ]
    right_delivered = np.concatenate(logits).argmax(axis=1) == test.labels
    with LineModel.open(line, device_dir) as model:
        predictions = [model.predict(image) for image in test.images]
    right_active = np.array([p.index for p in predictions]) == test.labels
    chosen = np.random.default_rng(seed).permutation(len(test))[:_SHOWN]
    shown = tuple(
        PredictionEntry(
            image=png_uri(test.images[n]),
            truth=task.labels[test.labels[n]],
            label=predictions[n].label,
            confidence=predictions[n].confidence,
        )
        for n in chosen
    )
    return Predicted(float(right_delivered.mean()), float(right_active.mean()), predictions[0].model_digest, shown)


def png_uri(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> str:
    """A uint8 [H, W, 3] image as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
