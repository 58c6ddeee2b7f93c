from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from kiridashi.errors import MissingExtraError
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.tflite import convert, start_tflite_export
from torch import Tensor, nn


def test_a_failing_conversion_tells_its_last_lines(classifier: Classifier, example: Tensor, tmp_path: Path) -> None:
    with start_tflite_export(classifier, example, tmp_path / "model.tflite") as running:
        next(running.folder.glob("*.pt2")).write_bytes(b"no archive")
        with pytest.raises(ExportError, match="File is not a zip file") as caught:
            running.result()
    assert "code 1" in caught.value.what
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_takes_too_long_is_stopped(classifier: Classifier, example: Tensor, tmp_path: Path) -> None:
    running = start_tflite_export(classifier, example, tmp_path / "model.tflite", timeout_s=0.0)
    with pytest.raises(ExportError, match="longer than 0 s"):
        running.result()
    assert running.process.poll() is not None
    assert list(tmp_path.iterdir()) == []


def test_leaving_the_block_stops_the_conversion(classifier: Classifier, example: Tensor, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        start_tflite_export(classifier, example, tmp_path / "model.tflite") as running,
    ):
        raise KeyboardInterrupt
    assert running.process.poll() is not None
    assert list(tmp_path.iterdir()) == []


def test_an_archive_with_pickles_is_not_opened(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "in.pt2")
    with pytest.raises(ExportError, match="pickled data"):
        convert(tmp_path / "in.pt2", tmp_path / "out.tflite")


def test_a_missing_converter_is_named_before_any_work(
    classifier: Classifier, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "litert_torch" else found(name))
    with pytest.raises(MissingExtraError) as caught:
        start_tflite_export(classifier, example, tmp_path / "model.tflite")
    assert "kiridashi[tflite]" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []
