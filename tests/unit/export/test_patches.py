from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi.manifest import Patch
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.patches import (
    Float32,
    check_tunable,
    locate_parameters,
    markers_for,
    place_parameters,
    with_parameters,
    write_parameters,
)


def random(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_finds_values_at_any_offset_and_with_swapped_axes(tmp_path: Path) -> None:
    bias, weight = random(5), random(3, 4, seed=1)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 7 + bias.tobytes() + b"yy" + np.ascontiguousarray(weight.T).tobytes())

    found = locate_parameters(path, {"bias": bias, "weight": weight})

    assert found.patches == (Patch("bias", 7, (5,)), Patch("weight", 29, (3, 4), transposed=True))
    assert not found.unlocated


def test_reports_what_is_missing_and_what_is_ambiguous(tmp_path: Path) -> None:
    twice, absent = random(5), random(5, seed=1)
    path = tmp_path / "file"
    path.write_bytes(twice.tobytes() + twice.tobytes())

    found = locate_parameters(path, {"twice": twice, "absent": absent})

    assert not found.patches
    assert "2 times" in found.unlocated["twice"]
    assert "not in file" in found.unlocated["absent"]


def test_a_row_or_column_matrix_is_not_found_twice(tmp_path: Path) -> None:
    row = random(1, 6)
    (tmp_path / "file").write_bytes(row.tobytes())
    assert locate_parameters(tmp_path / "file", {"row": row}).patches == (Patch("row", 0, (1, 6)),)


def test_markers_differ_from_each_other_and_are_the_same_in_every_run() -> None:
    parameters = {"a": np.zeros(8, np.float32), "b": np.zeros(8, np.float32)}
    markers = markers_for(parameters)
    assert markers["a"].dtype == np.float32
    assert not np.isin(markers["a"], markers["b"]).any()
    again = markers_for(dict(reversed(parameters.items())))
    assert all(np.array_equal(markers[name], again[name]) for name in parameters)


def test_equal_values_are_told_apart_by_marking(tmp_path: Path) -> None:
    tunable = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32), "w": random(2, 3)}

    def export(values: Mapping[str, Float32]) -> Path:
        path = tmp_path / "marked"
        path.write_bytes(b"".join((values["b"].tobytes(), b"zz", values["a"].tobytes(), values["w"].tobytes())))
        return path

    found = place_parameters(export, tunable, tmp_path / "true")

    assert {patch.parameter: patch.offset for patch in found.patches} == {"b": 0, "a": 18, "w": 34}
    assert (tmp_path / "true").read_bytes() == bytes(16) + b"zz" + bytes(16) + tunable["w"].tobytes()


def test_a_parameter_that_was_merged_is_reported_and_keeps_its_true_values(tmp_path: Path) -> None:
    tunable = {"plain": random(4), "merged": random(4, seed=1)}

    def export(values: Mapping[str, Float32]) -> Path:
        path = tmp_path / "marked"
        merged = values.get("merged", tunable["merged"]) * np.float32(2)
        path.write_bytes(values["plain"].tobytes() + merged.tobytes())
        return path

    found = place_parameters(export, tunable, tmp_path / "true")

    assert [patch.parameter for patch in found.patches] == ["plain"]
    assert list(found.unlocated) == ["merged"]
    assert (tmp_path / "true").read_bytes() == tunable["plain"].tobytes() + (2 * tunable["merged"]).tobytes()


def test_writing_refuses_another_shape_and_a_place_outside_the_file(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(bytes(16))
    with pytest.raises(ExportError, match="do not fit"):
        write_parameters(source, tmp_path / "out", [Patch("a", 0, (4,))], {"a": random(3)})
    with pytest.raises(ExportError, match="do not fit"):
        write_parameters(source, tmp_path / "out", [Patch("a", 4, (4,))], {"a": random(4)})
    assert not (tmp_path / "out").exists()


def test_changed_copy_leaves_the_model_alone(classifier: Classifier) -> None:
    before = classifier.head.bias.detach().clone()
    changed = with_parameters(classifier, {"head.bias": np.ones(4, np.float32)})
    assert changed.head.bias.detach().tolist() == [1, 1, 1, 1]
    assert classifier.head.bias.equal(before)


@pytest.mark.parametrize(
    ("tunable", "message"),
    [
        ({"head.scale": np.zeros(4, np.float32)}, "no parameter 'head.scale'"),
        ({"head.bias": np.zeros(5, np.float32)}, r"\(5,\)"),
        ({"head.bias": np.zeros(4, np.float64)}, "float64"),
        ({"head.bias": np.full(4, 9, np.float32)}, "not those of the model"),
    ],
)
def test_tunable_parameters_must_be_the_models(
    classifier: Classifier, tunable: dict[str, Float32], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_tunable(classifier, tunable)
