"""The reference that a bundle carries: small, the same bytes each time, of samples that do not repeat each other."""

from __future__ import annotations

import numpy as np
from kiridashi.drift.rows import MAX_REFERENCE_ROWS, decode_reference
from kiridashi.drift.statistics import NAMES, frame_statistics
from kiridashi.preprocess import softmax
from kiridashi_server.export.drift_reference import drift_reference, first_of_each

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
LOGITS = RNG.normal(size=(5, 3)).astype(np.float32)


def test_rows_are_what_a_device_would_note_of_the_same_frames(tmp_path) -> None:
    file = drift_reference(IMAGES, LOGITS, tmp_path)
    assert (file.artifact.kind, file.artifact.name) == ("drift-reference", "drift-reference.json")
    reference = decode_reference(file.path.read_bytes(), "here")
    assert reference.names == NAMES
    expected = [frame_statistics(image, p, (16, 16)) for image, p in zip(IMAGES, softmax(LOGITS), strict=True)]
    assert np.allclose([row.values for row in reference.rows], expected, rtol=1e-5, atol=1e-9)
    assert [row.best for row in reference.rows] == LOGITS.argmax(axis=1).tolist()


def test_the_same_samples_give_the_same_bytes_and_many_are_spread_over_all(tmp_path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        digests.append(drift_reference(IMAGES, LOGITS, tmp_path / name).artifact.sha256)
    assert digests[0] == digests[1]
    many = np.repeat(IMAGES[:1], MAX_REFERENCE_ROWS + 200, axis=0)
    logits = np.zeros((len(many), 3), np.float32)
    logits[-1, 2] = 9.0
    file = drift_reference(many, logits, tmp_path)
    rows = decode_reference(file.path.read_bytes(), "here").rows
    assert (len(rows), rows[-1].best) == (MAX_REFERENCE_ROWS, 2)
    assert file.artifact.bytes < 64 * 1024


def test_of_each_source_the_first_sample_counts() -> None:
    assert first_of_each(("b", "a", "b", "c", "a")) == (0, 1, 3)
