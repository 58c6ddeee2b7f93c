"""What people do with commands that they should not: each is answered with what was wrong, never as a defect."""

from __future__ import annotations

import json

import numpy as np
import pytest
from kiridashi.command import main
from kiridashi.errors import ExitCode
from kiridashi_agent.cli import enroll, label, predict, tune


def call(capsys, commands, *words: object) -> tuple[int, dict, str]:
    code = main("kiridashi-agent", "", commands, [*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out)["error"], captured.err


@pytest.mark.parametrize("place", ["folder", "missing"])
def test_a_request_that_cannot_be_written_says_where_and_keeps_the_keys(capsys, tmp_path, monkeypatch, place) -> None:
    output = tmp_path / "out"
    if place == "folder":
        output.mkdir()
    else:
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "request.json"
    words = ("enroll", "request", "--device", "cam-1", "--state", tmp_path / "state", "-o")
    code, error, _ = call(capsys, enroll.COMMANDS, *words, output)
    assert (code, error["what"]) == (ExitCode.INPUT, f"the request cannot be written to {output}")
    assert ".tmp" not in error["why"]
    key = (tmp_path / "state" / "tls" / "key.pem").read_bytes()
    assert main("kiridashi-agent", "", enroll.COMMANDS, [*map(str, words), str(tmp_path / "r.json")]) == ExitCode.OK
    assert (tmp_path / "state" / "tls" / "key.pem").read_bytes() == key


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (enroll.COMMANDS, ("enroll", "request", "--device", "cam-1", "-o", "/nowhere.json")),
        (label.COMMANDS, ("label", "--line", "press-3")),
    ],
)
def test_a_state_folder_that_is_a_file(capsys, tmp_path, commands, words) -> None:
    (tmp_path / "state").touch()
    code, error, _ = call(capsys, commands, *words, "--state", tmp_path / "state")
    assert (code, error["why"]) == (ExitCode.INPUT, "it is no folder")
    assert "--state" in error["next"]


@pytest.mark.parametrize("content", [b"", b"a picture", "npz"])
def test_a_frame_that_is_no_array(capsys, tmp_path, content) -> None:
    path = tmp_path / "frame.npy"
    if content == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3), b=np.zeros(3))
    else:
        path.write_bytes(content)
    code, error, _ = call(capsys, predict.COMMANDS, "predict", "--line", "press-3", path, "--state", tmp_path)
    assert (code, error["why"]) == (ExitCode.INPUT, "it is not an .npy file of numbers")
    assert "numpy.save" in error["next"]


def test_a_device_that_is_not_enrolled(capsys, tmp_path) -> None:
    code, error, _ = call(capsys, tune.COMMANDS, "tune", "--line", "press-3", "--state", tmp_path)
    assert (code, error["kind"]) == (ExitCode.INPUT, "InputError")
    assert "enroll request" in error["next"]
