from __future__ import annotations

import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi.manifest import Preprocessing
from kiridashi.preprocess import as_frames, resize, softmax, to_input
from PIL import Image

SPEC = Preprocessing(height=12, width=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def test_a_frame_of_the_models_size_is_not_touched() -> None:
    images = frames(2, 12, 10, 3)
    assert resize(images, 12, 10) is images


@pytest.mark.parametrize(
    ("old", "new"), [((96, 128), (32, 24)), ((64, 64), (64, 20)), ((20, 30), (48, 64)), ((7, 5), (3, 11))]
)
def test_resizing_agrees_with_an_imaging_library(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = frames(1, *old, 3)
    reference = np.asarray(Image.fromarray(image[0]).resize(new[::-1], Image.Resampling.BILINEAR))
    difference = np.abs(resize(image, *new)[0].astype(int) - reference.astype(int))
    assert difference.max() <= 1  # the library rounds once more, between the axes


def test_fine_texture_shrinks_to_its_mean_instead_of_aliasing() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    inner = resize(stripes, 8, 8)[0, :, 1:-1]
    assert np.abs(inner.astype(int) - 128).max() <= 2


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_normalisation_is_the_manifests_formula(layout: str) -> None:
    images = frames(3, 12, 10, 3)
    expected = (images / 255.0 - np.array(SPEC.mean)) / np.array(SPEC.std)
    got = to_input(images, SPEC, layout)  # type: ignore[arg-type]
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, expected if layout == "NHWC" else expected.transpose(0, 3, 1, 2), atol=2e-6)


def test_one_frame_becomes_a_batch() -> None:
    assert as_frames(frames(4, 5, 3)).shape == (1, 4, 5, 3)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_frame_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match=str(bad.dtype)):
        as_frames(bad)


def test_softmax_survives_large_logits() -> None:
    values = softmax(np.array([[1000.0, 0.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(values, [[1, 0], [0.5, 0.5]])
