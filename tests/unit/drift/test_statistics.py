"""What is noted of a frame answers to what happens to it."""

from __future__ import annotations

import numpy as np
import pytest
from kiridashi.drift.statistics import IMAGE_NAMES, NAMES, frame_statistics, image_statistics, output_statistics
from kiridashi.errors import InputError

VALUES = np.array([0.7, 0.2, 0.1], np.float32)


def scene(seed: int = 0, side: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.uniform(60, 180, (side // 4, side // 4, 3)), np.ones((4, 4, 1)))
    return (coarse + rng.normal(0, 3, coarse.shape)).clip(0, 255).astype(np.uint8)


def differences(change) -> dict[str, float]:
    before, after = (
        image_statistics(scene()),
        image_statistics(change(scene().astype(float)).clip(0, 255).astype(np.uint8)),
    )
    return dict(zip(IMAGE_NAMES, after - before, strict=True))


def blurred(image: np.ndarray) -> np.ndarray:
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    side = len(image)
    return sum(padded[i : i + side, j : j + side] for i in range(3) for j in range(3)) / 9


def test_each_kind_of_change_moves_its_own_number() -> None:
    assert differences(lambda image: image * 0.8)["brightness"] < -0.05
    assert differences(blurred)["sharpness"] < -0.2
    noise = np.random.default_rng(1).normal(0, 12, (32, 32, 3))
    assert differences(lambda image: image + noise)["grain"] > 0.5
    cast = differences(lambda image: image * np.array([1.1, 1.0, 0.9]))
    assert cast["red"] > 0.05
    assert cast["blue"] < -0.05
    assert differences(lambda image: image * 1.6)["clipped"] > 0.02
    lamp = np.linspace(0.8, 1.2, 32)[None, :, None]
    tilted = differences(lambda image: image * lamp)
    assert tilted["light-1-0"] < -0.02 < 0.02 < tilted["light-1-2"]


def test_a_plain_frame_has_finite_numbers() -> None:
    for shade in (0, 128, 255):
        plain = np.full((16, 20, 3), shade, np.uint8)
        assert np.isfinite(frame_statistics(plain, VALUES, (16, 20))).all()


def test_a_larger_frame_is_taken_at_the_models_size() -> None:
    large = np.repeat(np.repeat(scene(), 3, axis=0), 3, axis=1)
    found = dict(zip(NAMES, frame_statistics(large, VALUES, (32, 32)), strict=True))
    same = dict(zip(NAMES, frame_statistics(scene(), VALUES, (32, 32)), strict=True))
    assert found["brightness"] == pytest.approx(same["brightness"], abs=0.005)
    assert found["sharpness"] == pytest.approx(same["sharpness"], abs=0.25)


def test_outputs_are_confidence_and_relative_entropy() -> None:
    assert output_statistics(np.array([1, 0, 0, 0], np.float32)).tolist() == [1.0, 0.0]
    assert output_statistics(np.full(4, 0.25, np.float32)) == pytest.approx([0.25, 1.0])
    assert output_statistics(np.array([0.5], np.float32)) == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize(
    ("frame", "values", "size"),
    [
        (np.zeros((16, 16), np.uint8), VALUES, (16, 16)),
        (np.zeros((16, 16, 3), np.uint8), VALUES, (4, 16)),
        (np.zeros((16, 16, 3), np.float32), VALUES, (16, 16)),
        (np.zeros((16, 16, 3), np.uint8), np.array([np.nan, 0.5], np.float32), (16, 16)),
    ],
)
def test_what_has_no_statistics_is_refused(frame, values, size) -> None:
    with pytest.raises(InputError):
        frame_statistics(frame, values, size)
