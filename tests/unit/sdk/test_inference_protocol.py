from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kiridashi.errors import InputError
from kiridashi.inference_protocol import MAX_JSON_BYTES, Body, InferRequest, decode_request, encode_answer
from kiridashi.prediction import Prediction

SHAPE = [2, 3, 4, 3]
FRAMES = np.arange(72, dtype=np.uint8).reshape(SHAPE)
JSON_TENSOR = {"name": "frames", "datatype": "UINT8", "shape": SHAPE, "data": FRAMES.ravel().tolist()}
BINARY_TENSOR = {"name": "frames", "datatype": "UINT8", "shape": SHAPE, "parameters": {"binary_data_size": 72}}
PREDICTION = Prediction(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32), ("ok", "Kratzer ü"), "sha256:1", 7)


def in_json(tensor: dict[str, Any], **more: Any) -> Body:
    return Body(json.dumps({"inputs": [tensor], **more}).encode())


def in_binary(tensor: dict[str, Any], data: bytes, **more: Any) -> Body:
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return Body(head + data, len(head))


@pytest.mark.parametrize("data", [FRAMES.ravel().tolist(), FRAMES.tolist()])
def test_frames_as_numbers_flat_or_nested(data: list[Any]) -> None:
    request = decode_request(in_json(JSON_TENSOR | {"data": data}, id="42"), 8)
    np.testing.assert_array_equal(request.frames, FRAMES)
    assert request.frames.dtype == np.uint8
    assert request.id == "42"
    assert request.outputs == (("probabilities", False), ("index", False), ("label", False))


@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.just(3))))
def test_frames_in_binary_form_are_the_same(frames: np.ndarray) -> None:
    tensor = BINARY_TENSOR | {"shape": list(frames.shape), "parameters": {"binary_data_size": frames.size}}
    np.testing.assert_array_equal(decode_request(in_binary(tensor, frames.tobytes()), 8).frames, frames)


def test_one_frame_without_a_batch_axis() -> None:
    assert decode_request(in_json(JSON_TENSOR | {"shape": [6, 4, 3]}), 8).frames.shape == (1, 6, 4, 3)


def test_outputs_are_chosen_with_their_forms() -> None:
    asked = [{"name": "label"}, {"name": "index", "parameters": {"binary_data": False}}]
    request = decode_request(in_json(JSON_TENSOR, outputs=asked, parameters={"binary_data_output": True}), 8)
    assert request.outputs == (("label", True), ("index", False))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (Body(b""), "0 bytes"),
        (Body(b"{}", 5), "5 bytes of 2"),
        (Body(b"{" * 100), "not that of the inference protocol"),
        (Body(b"[" * 100_000), "not that of the inference protocol"),
        (in_json(JSON_TENSOR | {"name": "image"}), "one input, 'frames'"),
        (Body(json.dumps({"inputs": [JSON_TENSOR] * 2}).encode()), "one input"),
        (in_json(JSON_TENSOR | {"datatype": "FP32"}), "FP32"),
        (in_json(JSON_TENSOR | {"shape": [72]}), r"UINT8 \[72\]"),
        (in_json(JSON_TENSOR | {"shape": []}), r"UINT8 \[\]"),
        (in_json(JSON_TENSOR | {"shape": [2, 4, 3, 3]}), None),
        (in_json(JSON_TENSOR | {"shape": [-2, -3, 4, 3]}), "UINT8"),
        (in_json(JSON_TENSOR | {"shape": [8, 1, 3, 3]}), None),
        (in_json(JSON_TENSOR | {"shape": [9, 1, 1, 3]}), "9 frames"),
        (in_json(JSON_TENSOR | {"shape": [2, 3, 3, 3]}), "72 values.*needs 54"),
        (in_json(JSON_TENSOR | {"data": [256] * 72}), "integers from 0 to 255"),
        (in_json(JSON_TENSOR | {"data": [-1] * 72}), "integers from 0 to 255"),
        (in_json(JSON_TENSOR | {"data": [0.5] * 72}), "integers from 0 to 255"),
        (in_json(JSON_TENSOR | {"data": [True] * 72}), "integers from 0 to 255"),
        (in_json(JSON_TENSOR | {"data": [2**70] * 72}), "integers from 0 to 255"),
        (in_json(JSON_TENSOR | {"data": []}), "integers from 0 to 255"),
        (in_json(JSON_TENSOR | {"data": [[1], [1, 2]]}), "cannot be read"),
        (in_json(JSON_TENSOR | {"data": "AAAA"}), "cannot be read"),
        (in_json({k: v for k, v in JSON_TENSOR.items() if k != "data"}), "integers from 0 to 255"),
        (in_binary(JSON_TENSOR, b"more"), "4 bytes follow"),
        (in_binary(BINARY_TENSOR, bytes(71)), "announces 72 bytes, 71 follow"),
        (in_binary(BINARY_TENSOR | {"shape": [1, 3, 4, 3]}, bytes(72)), "72 values"),
        (in_binary(BINARY_TENSOR | {"parameters": {"binary_data_size": True}}, b"1"), "announces"),
        (in_binary(JSON_TENSOR | BINARY_TENSOR, bytes(72)), "announces"),
        (in_json(JSON_TENSOR, outputs=[{"name": "logits"}]), "no output 'logits'"),
        (in_json(JSON_TENSOR, outputs=[{"name": "label"}] * 2), "asked for twice"),
        (in_json(JSON_TENSOR, outputs=[{"name": "label", "parameters": {"classification": 2}}]), "classification"),
        (Body(b" " * (MAX_JSON_BYTES + 1)), "binary tensors"),
    ],
)
def test_what_is_no_request_is_refused_and_says_why(body: Body, message: str | None) -> None:
    if message is None:  # another shape of as many values: it is what the sender says
        assert decode_request(body, 8).frames.size == 72
        return
    with pytest.raises(InputError, match=message):
        decode_request(body, 8)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-1, 300)))
def test_noise_never_does_more_than_be_refused(data: bytes, json_bytes: int | None) -> None:
    with pytest.raises(InputError):
        decode_request(Body(data, json_bytes), 8)


def test_an_answer_in_json() -> None:
    request = InferRequest("42", FRAMES, (("probabilities", False), ("index", False), ("label", False)))
    body = encode_answer("press-3", request, PREDICTION)
    answer = json.loads(body.data)
    assert body.json_bytes is None
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("press-3", "7", "42")
    assert answer["parameters"] == {"model_digest": "sha256:1"}
    probabilities, index, label = answer["outputs"]
    assert (probabilities["datatype"], probabilities["shape"]) == ("FP32", [2, 2])
    assert all(
        math.isclose(a, b, abs_tol=1e-7) for a, b in zip(probabilities["data"], [0.25, 0.75, 0.9, 0.1], strict=True)
    )
    assert (index["datatype"], index["shape"], index["data"]) == ("INT64", [2], [1, 0])
    assert (label["datatype"], label["shape"], label["data"]) == ("BYTES", [2], ["Kratzer ü", "ok"])


def test_an_answer_in_binary_form_follows_the_json_in_the_order_of_its_outputs() -> None:
    request = InferRequest("", FRAMES, (("label", True), ("index", False), ("probabilities", True)))
    body = encode_answer("press-3", request, PREDICTION)
    assert body.json_bytes is not None
    answer, rest = json.loads(body.data[: body.json_bytes]), body.data[body.json_bytes :]
    sizes = [output.get("parameters", {}).get("binary_data_size", 0) for output in answer["outputs"]]
    assert sum(sizes) == len(rest)
    words = "Kratzer ü".encode()
    assert rest[: sizes[0]] == len(words).to_bytes(4, "little") + words + b"\x02\x00\x00\x00ok"
    np.testing.assert_array_equal(np.frombuffer(rest[sizes[0] :], "<f4").reshape(2, 2), PREDICTION.values)
    assert "data" not in answer["outputs"][0]
    assert "id" not in answer
