"""Measuring any model file, with real runtimes: inputs that are open, several, of odd formats, or no numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as tflite
from kiridashi.errors import BundleError, ExitCode, InputError, RuntimeUnavailableError
from kiridashi.runtime import open_bare
from kiridashi.runtime.bare import Input, make_feed, resolve_shapes
from kiridashi_agent.cli import main
from kiridashi_agent.jobs import MeasureRequest
from kiridashi_agent.measure import run
from kiridashi_agent.subject import open_plain
from onnx import TensorProto

from tests.assets import odd_models

QUICK = {"runs": 20, "max_runs": 40, "seconds": 0.2}


def measured(path: Path, **fields: object):
    return run(MeasureRequest(str(path), **(QUICK | fields)))  # type: ignore[arg-type]


def test_a_classifier_is_timed_as_a_line_runs_it_and_bare_on_request(shipped: Path) -> None:
    for name in ("model.onnx", "model.tflite"):
        whole, bare = measured(shipped / name, max_runs=2000), measured(shipped / name, bare=True)
        assert (whole.timed, bare.timed) == ("line", "model")
        assert bare.quiet_ms < whole.quiet_ms
        assert whole.first_ms > 0
        assert 0 < whole.steady_bytes <= whole.memory_bytes
        assert 0 < whole.load_peak_bytes <= whole.memory_bytes
        # On a machine as busy as a test machine the runs may be worth too few for an interval: below six there is none.
        low, high = whole.p50_ci_ms or (0.0, 0.0)
        assert low <= whole.latency_p50_ms <= high or whole.independent_runs < 6
        assert whole.conditions is not None
        assert whole.conditions.processors >= 1


def test_several_inputs_and_an_open_batch(tmp_path: Path) -> None:
    path = odd_models.two_inputs_onnx(tmp_path / "lookup.onnx")
    with pytest.raises(InputError) as caught:
        measured(path)
    assert "tokens int64 [?, ?]" in str(caught.value)
    assert caught.value.next_step == "say it: --shape tokens=1x128"
    found = measured(path, shapes={"tokens": (1, 16)})
    assert (found.timed, found.provider, found.runs) == ("model", "cpu", 40)
    model = open_bare(odd_models.sum_tflite(tmp_path / "sum.tflite"))
    assert resolve_shapes(model.inputs, {}, "sum") == {"left": (1, 4), "right": (1, 4)}
    assert measured(tmp_path / "sum.tflite", shapes={"left": (3, 4), "right": (3, 4)}).timed == "model"


def test_a_size_that_is_open_is_asked_for(tmp_path: Path) -> None:
    path = odd_models.segmenter_onnx(tmp_path / "segmenter.onnx")
    with pytest.raises(InputError) as caught:
        measured(path)
    assert caught.value.next_step == "say it: --shape image=1x3x224x224"
    assert measured(path, shapes={"": (2, 3, 16, 16)}).timed == "model"


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({"picture": (1, 3, 8, 8)}, "has no input 'picture'"),
        ({"image": (1, 4, 8, 8)}, "does not take 1x4x8x8 as its input 'image'"),
        ({"image": (3, 8, 8)}, "does not take 3x8x8"),
        ({"image": (1, 3, 20000, 20000)}, "over 1 GiB"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path, shapes, part: str) -> None:
    with pytest.raises(InputError) as caught:
        measured(odd_models.segmenter_onnx(tmp_path / "segmenter.onnx"), shapes=shapes)
    assert part in str(caught.value)


def test_a_shape_without_a_name_needs_a_single_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has several inputs"):
        measured(odd_models.two_inputs_onnx(tmp_path / "lookup.onnx"), shapes={"": (1, 2)})


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "INT8", "UINT8", "UINT16", "INT32", "INT64", "BOOL"])
def test_every_number_format_is_made_up(tmp_path: Path, kind: str) -> None:
    path = odd_models.of_kind_onnx(tmp_path / f"{kind}.onnx", getattr(TensorProto, kind))
    assert measured(path).runs == 40


def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path) -> None:
    for path in (
        odd_models.of_kind_onnx(tmp_path / "text.onnx", TensorProto.STRING),
        odd_models.sequence_onnx(tmp_path / "sequence.onnx"),
    ):
        with pytest.raises(InputError, match="only arrays of numbers"):
            measured(path)


def test_integers_of_tflite(tmp_path: Path) -> None:
    path = odd_models.sum_tflite(tmp_path / "sum.tflite", tflite.TensorType.INT32)
    assert measured(path).provider == "cpu"  # XNNPACK has no kernel for it
    with pytest.raises(RuntimeUnavailableError, match="could not give"):
        measured(path, providers=("xnnpack",))


def test_shapes_that_tflite_cannot_be_given(tmp_path: Path) -> None:
    path = odd_models.sum_tflite(tmp_path / "sum.tflite")
    with pytest.raises(BundleError, match=r"sum\.tflite"):
        measured(path, shapes={"left": (2, 4), "right": (3, 4)})


def test_made_up_values_are_valid_as_places_in_a_table() -> None:
    kinds = ("float32", "float16", "int64", "uint8", "int8", "bool", "complex64")
    inputs = tuple(Input(name, np.dtype(name), (2, 50), name) for name in kinds)
    feed = make_feed(inputs, dict.fromkeys(kinds, (2, 50)), np.random.default_rng(0))
    assert {name: values.dtype.name for name, values in feed.items()} == {name: name for name in kinds}
    assert set(feed["int64"].ravel()) == {1}
    assert feed["uint8"].max() > 200
    assert feed["int8"].min() < -100
    assert abs(feed["float32"]).max() > 1.5


def test_a_provider_that_is_not_here_is_refused(shipped: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="tensorrt"):
        open_plain(shipped / "model.onnx", MeasureRequest("", providers=("tensorrt",)))
    assert measured(shipped / "model.tflite", providers=("cpu",)).provider == "cpu"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def test_the_command_compares_keeps_and_submits(shipped: Path, state: Path, tmp_path: Path, capsys) -> None:
    same = tmp_path / "same.onnx"
    same.write_bytes((shipped / "model.onnx").read_bytes())
    files, submitted = [str(shipped / "model.onnx"), str(same)], tmp_path / "out.json"
    common = ["measure", *files, "--state", str(state), "--seconds", "0.3"]
    assert main([*common, "--json", "--submit", str(submitted)]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in found["files"]] == files
    for row in found["files"]:
        assert row["measured"]["hardware"] in ("real", "emulated")
        assert row["verdict"]["within"]
        assert row["agreement"]["within"] or row["agreement"]["reasons"]
        assert len(row["rounds"]) == 2
    (compared,) = found["comparison"]["rows"]
    # Twice the same file: whatever the machine does, the ratio is near 1.
    assert 0.8 < compared["ratio"] < 1.25
    assert compared["low"] <= compared["ratio"] <= compared["high"]
    shared = json.loads(submitted.read_text())
    assert [row["file"] for row in shared["report"]["files"]] == ["model.onnx", "same.onnx"]
    assert str(tmp_path) not in submitted.read_text()
    assert main(["measure", "--history", "--state", str(state), "--json"]) == ExitCode.OK
    assert [entry["file"] for entry in json.loads(capsys.readouterr().out)["entries"]] == ["model.onnx", "same.onnx"]
    assert main([*common[:2], *common[3:], "--csv"]) == ExitCode.OK
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(row["latency_p50_ms"]) > 0
    assert main(["measure", "--history", files[0], "--state", str(state)]) == ExitCode.OK
    assert capsys.readouterr().out.count("model.onnx") == 2  # same.onnx has the same content, and is listed too


def test_once_is_one_process_and_leaves_no_trace(shipped: Path, state: Path, capsys) -> None:
    files = [str(shipped / name) for name in ("model.onnx", "model.tflite")]
    assert main(["measure", *files, "--once", "--seconds", "0.2", "--state", str(state), "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found["comparison"] is None
    assert [len(row["rounds"]) for row in found["files"]] == [1, 1]
    assert list(state.iterdir()) == []


def test_a_history_that_cannot_be_kept_does_not_stop_measuring(shipped: Path, state: Path, capsys) -> None:
    (state / "measurements.jsonl").mkdir()
    arguments = ["measure", str(shipped / "model.tflite"), "--seconds", "0.2", "--state", str(state), "--json"]
    assert main(arguments) == ExitCode.OK
    captured = capsys.readouterr()
    assert json.loads(captured.out)["files"][0]["measured"]["runs"] >= 100
    assert captured.err.count("the history") == 2  # not read, and not kept


def test_a_memory_limit_ends_the_process(shipped: Path, state: Path, capsys) -> None:
    arguments = ["measure", str(shipped / "model.onnx"), "--once", "--state", str(state), "--memory-limit", "30MiB"]
    assert main(arguments) == ExitCode.MEASURE
    assert "its limit of 30 MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "neither was given"),
        (["x.onnx", "--profile", "d"], "both were given"),
        (["--profile", "d", "--csv"], "--csv is for model files"),
        (["--profile", "d", "--memory-limit", "1MiB"], "--memory-limit is for model files"),
        (["x.onnx", "-o", "r.json"], "--output belongs to --profile"),
        (["x.onnx", "--csv", "--json"], "cannot both be printed"),
        (["x.onnx", "--rounds", "0"], "must be above zero"),
        (["x.onnx", "--seconds", "inf"], "must be above zero"),
        (["x.onnx", "--shape", "x=1x"], "cannot be read"),
        (["x.onnx"], "does not exist"),
        (["--history", "x.onnx"], "does not exist"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path, capsys, arguments: list[str], part: str) -> None:
    assert main(["measure", *arguments, "--state", str(tmp_path)]) == ExitCode.INPUT
    captured = capsys.readouterr()
    assert part in captured.err + captured.out
