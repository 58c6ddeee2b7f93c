"""Requests and answers of the Open Inference Protocol (KServe v2) over HTTP, with binary tensors. Pure.

Source: the protocol's REST specification and its binary tensor data extension (kserve.github.io, "V2 protocol").
A model takes camera frames as they are, ``frames`` UINT8 [N, H, W, 3], and gives three outputs: ``probabilities`` FP32
[N, classes], ``index`` INT64 [N] and ``label`` BYTES [N], the best class of every frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import InputError
from kiridashi.line import LineInfo
from kiridashi.prediction import Prediction

INPUT = "frames"
OUTPUTS = {"probabilities": "FP32", "index": "INT64", "label": "BYTES"}
MAX_JSON_BYTES = 8 * 1024 * 1024
_RANKS = (3, 4)
_FULL = 255


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Body(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


@dataclass(frozen=True, slots=True)
class InferRequest:
    """Frames uint8 [N, H, W, 3], and what the answer has to hold: names of outputs, each in binary form or in JSON."""

    id: str
    frames: NDArray[np.uint8]
    outputs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Body:
    """An HTTP body; ``json_bytes`` is the length of its JSON part where binary tensors follow, else None."""

    data: bytes
    json_bytes: int | None = None


def decode_request(body: Body, max_frames: int) -> InferRequest:
    """Read and check a request.

    Raises:
        InputError: not a request of the protocol, or not frames of this model; says what was wrong.
    """
    size = len(body.data) if body.json_bytes is None else body.json_bytes
    if not 0 < size <= min(len(body.data), MAX_JSON_BYTES):
        raise InputError(
            f"the JSON part is given as {size} bytes of {len(body.data)}",
            why=f"at most {MAX_JSON_BYTES} are read as JSON; larger frames are sent as binary tensors",
        )
    try:
        request = msgspec.json.decode(body.data[:size], type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("the request is not that of the inference protocol", why=str(error)) from error
    if [tensor.name for tensor in request.inputs] != [INPUT]:
        raise InputError(f"the request has to hold one input, '{INPUT}'")
    frames = _frames(request.inputs[0], memoryview(body.data)[size:], max_frames)
    return InferRequest(request.id, frames, _wanted(request))


def encode_answer(line: str, request: InferRequest, prediction: Prediction) -> Body:
    """The answer to ``request``; ``prediction`` is that of a batch."""
    values: dict[str, NDArray[Any]] = {"probabilities": prediction.values, "index": prediction.indices}
    labels = [prediction.labels[n] for n in prediction.indices]
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for name, binary in request.outputs:
        array = values.get(name)
        shape = [len(labels)] if array is None else list(array.shape)
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": shape}
        if binary:
            pieces.append(_packed(labels) if array is None else array.astype(array.dtype.newbyteorder("<")).tobytes())
            output["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            # The protocol's arrays are row-major and may be flat, which is what most clients send and expect.
            output["data"] = labels if array is None else array.ravel().tolist()
        outputs.append(output)
    answer = {
        "model_name": line,
        "model_version": str(prediction.version),
        "parameters": {"model_digest": prediction.model_digest},
        "outputs": outputs,
    }
    if request.id:
        answer["id"] = request.id
    head = msgspec.json.encode(answer)
    return Body(head + b"".join(pieces), len(head)) if pieces else Body(head)


def model_metadata(info: LineInfo, labels: tuple[str, ...]) -> dict[str, Any]:
    """The answer to a question for the model, with the labels and what computes it beside the protocol's own fields."""
    suffix = info.artifact.rpartition(".")[2]
    shapes = {"probabilities": [-1, len(labels)], "index": [-1], "label": [-1]}
    return {
        "name": info.line,
        "versions": [str(info.version)],
        "platform": f"{info.runtime.partition(' ')[0]}_{suffix}",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
        "outputs": [{"name": name, "datatype": kind, "shape": shapes[name]} for name, kind in OUTPUTS.items()],
        "labels": labels,
        "model_digest": info.model_digest,
        "runtime": info.runtime,
        "provider": info.provider,
        "input_size": [info.height, info.width],
    }


def _frames(tensor: _Tensor, binary: memoryview, max_frames: int) -> NDArray[np.uint8]:
    shape = tensor.shape if len(tensor.shape) == _RANKS[1] else [1, *tensor.shape]
    if tensor.datatype != "UINT8" or len(tensor.shape) not in _RANKS or shape[3] != 3 or min(shape) < 1:
        raise InputError(
            f"'{INPUT}' is {tensor.datatype} {tensor.shape}",
            why="it has to be UINT8, RGB, [height, width, 3] or [number, height, width, 3]",
        )
    if shape[0] > max_frames:
        raise InputError(f"{shape[0]} frames in one request", why=f"at most {max_frames} are taken")
    size, count = tensor.parameters.get("binary_data_size"), math.prod(shape)
    if size is None:
        values = _from_json(tensor.data, len(binary))
    elif type(size) is int and size == len(binary) and not len(tensor.data):
        values = np.frombuffer(binary, np.uint8)
    else:
        raise InputError(f"'{INPUT}' announces {size} bytes, {len(binary)} follow the JSON part")
    if values.size != count:
        raise InputError(f"'{INPUT}' has {values.size} values, its shape {tensor.shape} needs {count}")
    return values.reshape(shape)


def _from_json(data: msgspec.Raw, left_over: int) -> NDArray[np.uint8]:
    if left_over:
        raise InputError(f"{left_over} bytes follow the JSON part", why="no input announces them")
    try:
        values = np.asarray(msgspec.json.decode(data or b"[]", type=list[Any]))
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InputError(f"the data of '{INPUT}' cannot be read", why=str(error)) from error
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > _FULL:
        raise InputError(f"the data of '{INPUT}' has to be integers from 0 to {_FULL}")
    return values.astype(np.uint8)


def _wanted(request: _Body) -> tuple[tuple[str, bool], ...]:
    usual = request.parameters.get("binary_data_output", False)
    asked = request.outputs or [_Output(name) for name in OUTPUTS]
    for output in asked:
        if output.name not in OUTPUTS:
            raise InputError(f"there is no output '{output.name}'", why=f"there are {', '.join(OUTPUTS)}")
        if output.parameters.get("classification"):
            raise InputError("the classification extension is not served", next_step="ask for 'label' and 'index'")
    if len({output.name for output in asked}) != len(asked):
        raise InputError("an output is asked for twice")
    return tuple((output.name, output.parameters.get("binary_data", usual) is True) for output in asked)


def _packed(texts: list[str]) -> bytes:
    """BYTES elements: each its length in four bytes, little-endian, then its UTF-8."""
    encoded = (text.encode() for text in texts)
    return b"".join(len(data).to_bytes(4, "little") + data for data in encoded)
