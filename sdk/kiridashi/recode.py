"""Writing other parameters into a smaller model file: float16 weights are cast, int8 weights quantised anew.

Symmetric quantisation, as both runtimes' quantisers do it: per channel, scale = largest magnitude / limit, and a bias
in int32 with the scale of its input times that of its weight. The ranges of activations stay as they were calibrated,
so what comes out has to be judged by its predictions. No model library is needed: the manifest lists the places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import BundleError
from kiridashi.manifest import Code

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
_TYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "int8": np.dtype("i1"), "int32": np.dtype("<i4")}
_INT32 = 2**31 - 1
_SLACK = 1.0001
"""How far a scale stays above the one with which a bias would just fit int32."""


def recode(data: bytes, codes: Sequence[Code], values: Mapping[str, Floats], source: str) -> bytes:
    """The bytes of a model file with other parameters.

    Args:
        data: the file.
        codes: how the file holds its parameters.
        values: new ones, each in its own shape, finite; parameters that are not among them stay.
        source: the file's name, for messages.

    Raises:
        BundleError: a place lies outside the file, or values do not fit it.
    """
    out = bytearray(data)
    known = {code.parameter: code for code in codes}
    biases = {code.weight: code for code in codes if code.dtype == "int32" and code.weight}
    scales: dict[str, Doubles] = {}
    for code in codes:
        if code.dtype == "int32" or code.parameter not in values:
            continue
        new = _checked(values[code.parameter], code, source)
        if code.dtype == "float16":
            _write(out, code.offset, _in_file_order(new, code).astype("<f2"))
            continue
        scales[code.parameter] = _new_scales(data, code, new, biases.get(code.parameter), values, source)
        levels = np.rint(new / _along(scales[code.parameter].astype(np.float32), code))
        _write(out, code.offset, _in_file_order(np.clip(levels, -code.limit, code.limit), code).astype("i1"))
        _write(out, code.scales, scales[code.parameter].astype("<f4"))
    for code in codes:
        if code.dtype == "int32" and (code.parameter in values or code.weight in scales):
            scale = _scales(data, code, source)
            bias = values.get(code.parameter, decode(data, code, source))
            if code.weight in scales:
                scale = scale * scales[code.weight] / _scales(data, known[code.weight], source)
            scale = scale.astype(np.float32).astype(np.float64)
            levels = np.clip(np.rint(_checked(bias, code, source).astype(np.float64) / scale), -_INT32, _INT32)
            _write(out, code.offset, levels.astype("<i4"))
            _write(out, code.scales, scale.astype("<f4"))
    return bytes(out)


def decode(data: bytes, code: Code, source: str) -> Floats:
    """The parameter that a file holds, float32 in its own shape.

    Raises:
        BundleError: its place lies outside the file.
    """
    kind = _TYPES[code.dtype]
    count = math.prod(code.shape)
    if code.offset + count * kind.itemsize > len(data):
        raise BundleError(f"the place of '{code.parameter}' in {source} lies outside the file")
    stored = np.frombuffer(data, kind, count, code.offset).reshape([code.shape[axis] for axis in code.order])
    found = np.ascontiguousarray(stored.transpose(np.argsort(code.order)), np.float32)
    return found if code.dtype == "float16" else found * _along(_scales(data, code, source).astype(np.float32), code)


def _new_scales(
    data: bytes, code: Code, new: Floats, bias: Code | None, values: Mapping[str, Floats], source: str
) -> Doubles:
    """Scales with which the weights fill their range, and the bias fits int32. A channel of zeros keeps its own."""
    old = _scales(data, code, source)
    channels = new.reshape(1, -1) if code.channels == 1 else np.moveaxis(new, code.axis, 0).reshape(code.channels, -1)
    scale: Doubles = np.abs(channels).max(axis=1).astype(np.float64) / code.limit
    scale = np.where(scale < np.finfo(np.float32).tiny, old, scale).astype(np.float32).astype(np.float64)
    if bias is not None:
        held = np.abs(values.get(bias.parameter, decode(data, bias, source)).astype(np.float64)).reshape(-1)
        least = _SLACK * held / (_INT32 * _scales(data, bias, source) / old)  # theirs is the input's times the weight's
        scale = np.maximum(scale, least if code.channels > 1 else least.max())
    return scale


def _scales(data: bytes, code: Code, source: str) -> Doubles:
    if code.scales + 4 * code.channels > len(data):
        raise BundleError(f"the scales of '{code.parameter}' in {source} lie outside the file")
    found = np.frombuffer(data, "<f4", code.channels, code.scales).astype(np.float64)
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise BundleError(f"the scales of '{code.parameter}' in {source} are none")
    return found


def _along(scales: Floats, code: Code) -> Floats:
    """Scales in a shape that goes with the parameter's."""
    if code.channels == 1:
        return scales.reshape([1] * len(code.shape))
    return scales.reshape([-1 if axis == code.axis else 1 for axis in range(len(code.shape))])


def _checked(values: Floats, code: Code, source: str) -> Floats:
    if values.size != math.prod(code.shape) or not np.isfinite(values).all():
        raise BundleError(f"no usable values for '{code.parameter}' of {source}")
    return values.reshape(code.shape)


def _in_file_order(values: NDArray[np.generic], code: Code) -> NDArray[np.generic]:
    return np.ascontiguousarray(values.transpose(code.order))


def _write(out: bytearray, offset: int, values: NDArray[np.generic]) -> None:
    piece = values.tobytes()
    out[offset : offset + len(piece)] = piece
