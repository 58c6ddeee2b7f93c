"""Where and how a smaller file holds its parameters, so that a device can write tuned ones into it.

Found by the graph: which integers are a weight, what are their scales, which bias belongs to them. A weight is taken
for the parameter whose values it comes from. Then the device's own arithmetic writes the true values anew, and only
what comes out as the quantiser left it is listed: a place that is wrong, or a quantiser that works in another way,
costs the parameter its place and never the device its model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from kiridashi.artifacts import write_atomic
from kiridashi.manifest import Code
from kiridashi.recode import decode, recode
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
_SEED = 0x636F6465
_HALF_STEP = 0.501
_INT32 = 2**31 - 1
_FORMS: Mapping[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,),),
    2: ((0, 1), (1, 0)),
    4: ((0, 1, 2, 3), (0, 2, 3, 1), (1, 2, 3, 0)),
}


@dataclass(frozen=True)
class Stored:
    """A constant of a file: its values as they lie there, where, and for integers the scales and their axis."""

    values: NDArray[Any]
    offset: int
    scales: Float32
    scales_offset: int
    axis: int

    @property
    def floats(self) -> Float32:
        """What the integers stand for."""
        shape = [-1 if axis == self.axis else 1 for axis in range(self.values.ndim)]
        scales = self.scales.reshape(shape if self.scales.size > 1 else [1] * self.values.ndim)
        return np.asarray(self.values.astype(np.float32) * scales, np.float32)


@dataclass(frozen=True)
class Layer:
    """An operator's weight and, if it has one, its bias."""

    weight: Stored
    bias: Stored | None


def onnx_codes(path: Path, parameters: Mapping[str, Float32], wanted: Collection[str]) -> tuple[Code, ...]:
    """How a static int8 ONNX file (QDQ, constants in ``raw_data``) holds the ``wanted`` ones of a model's parameters.

    Those that cannot be told are left out.
    """
    return _only(wanted, _codes(path.read_bytes(), list(_onnx_layers(path)), parameters, path.name))


def tflite_codes(path: Path, parameters: Mapping[str, Float32], wanted: Collection[str]) -> tuple[Code, ...]:
    """The same of a static int8 TFLite file."""
    data = path.read_bytes()
    return _only(wanted, _codes(data, list(_tflite_layers(data)), parameters, path.name))


def mend_tflite(path: Path, parameters: Mapping[str, Float32]) -> tuple[str, ...]:
    """Write those weights of a static int8 TFLite file anew whose bias was clipped; the names of the biases.

    A channel that is nearly dead has a tiny scale, at which its bias does not fit int32. The quantiser clips it, and
    what the channel adds is lost, or has the other sign; a larger scale costs the weights nothing that counts.
    """
    data = path.read_bytes()
    codes = _found(list(_tflite_layers(data)), parameters)
    clipped = [code for code in codes if code.dtype == "int32" and _is_clipped(data, code)]
    touched = {code.parameter for code in clipped} | {code.weight for code in clipped}
    if touched:
        values = {name: value for name, value in parameters.items() if name in touched}
        write_atomic(path, recode(data, codes, values, path.name))
    return tuple(code.parameter for code in clipped)


def _is_clipped(data: bytes, code: Code) -> bool:
    levels = np.frombuffer(data, "<i4", code.shape[0], code.offset).astype(np.int64)
    return bool(np.abs(levels).max() >= _INT32)


def float16_codes(
    path: Path, marked: Path, markers: Mapping[str, Float32], true: Mapping[str, Float32]
) -> tuple[Code, ...]:
    """The same of a file with float16 weights: ``marked`` is made alike and holds ``markers`` in their place."""
    data, other = path.read_bytes(), marked.read_bytes()
    codes = []
    for name, values in markers.items():
        for axes in _FORMS.get(values.ndim, ()):
            pattern = values.transpose(axes).astype("<f2").tobytes()
            if other.count(pattern) == 1:
                order = () if axes == tuple(range(values.ndim)) else axes
                codes.append(Code(name, "float16", other.index(pattern), values.shape, order))
                break
    return _proved(data, codes, true, path.name) if len(data) == len(other) else ()


def _only(wanted: Collection[str], codes: Sequence[Code]) -> tuple[Code, ...]:
    """Without the others; the bias of a weight that is left out keeps its scales."""
    return tuple(
        code if code.weight in wanted else msgspec.structs.replace(code, weight="")
        for code in codes
        if code.parameter in wanted
    )


def _codes(data: bytes, layers: Sequence[Layer], parameters: Mapping[str, Float32], source: str) -> tuple[Code, ...]:
    return _proved(data, _found(layers, parameters), parameters, source)


def _found(layers: Sequence[Layer], parameters: Mapping[str, Float32]) -> list[Code]:
    """The weights and biases that can be told by their values and the graph."""
    codes: list[Code] = []
    for layer in layers:
        weight = _weight_code(layer.weight, parameters)
        if weight is None or any(code.parameter == weight.parameter for code in codes):
            continue
        codes.append(weight)
        if layer.bias is not None:
            bias = _bias_code(layer.bias, weight, parameters, {code.parameter for code in codes})
            codes += [] if bias is None else [bias]
    return codes


def _weight_code(stored: Stored, parameters: Mapping[str, Float32]) -> Code | None:
    floats, limit = stored.floats, int(np.abs(stored.values.astype(np.int32)).max())
    step = stored.scales.max() * _HALF_STEP
    found = [
        (name, axes)
        for name, values in parameters.items()
        for axes in _FORMS.get(values.ndim, ())
        if values.ndim > 1
        and tuple(values.shape[axis] for axis in axes) == floats.shape
        and np.abs(values.transpose(axes) - floats).max() <= step
    ]
    if len({name for name, _ in found}) != 1 or limit == 0:
        return None
    name, axes = found[0]
    plain = axes == tuple(range(len(axes)))
    return Code(
        parameter=name,
        dtype="int8",
        offset=stored.offset,
        shape=parameters[name].shape,
        axes=() if plain else axes,
        scales=stored.scales_offset,
        channels=stored.scales.size,
        axis=axes[stored.axis],
        limit=limit,
    )


def _bias_code(stored: Stored, weight: Code, parameters: Mapping[str, Float32], taken: set[str]) -> Code | None:
    """The bias of a layer; of several with the same values (zeros, say) the one that is called like the weight."""
    floats, steps, most = stored.floats.reshape(-1), stored.scales * _HALF_STEP, _INT32 * stored.scales
    clipped = np.abs(stored.values.reshape(-1).astype(np.int64)) >= _INT32  # with either sign: some overflow
    found = [
        name
        for name, values in parameters.items()
        if name not in taken
        and values.shape == floats.shape
        and np.where(
            clipped,
            np.abs(values) >= 0.999 * most,
            np.abs(values - floats) <= steps + 1e-6 * np.abs(floats),
        ).all()
    ]
    prefix = weight.parameter.rpartition(".")[0]
    alike = [name for name in found if name.rpartition(".")[0] == prefix]
    if len(found) != 1 and len(alike) != 1:
        return None
    return Code(
        parameter=alike[0] if len(alike) == 1 else found[0],
        dtype="int32",
        offset=stored.offset,
        shape=floats.shape,
        scales=stored.scales_offset,
        channels=stored.scales.size,
        weight=weight.parameter,
    )


def _proved(data: bytes, codes: Sequence[Code], parameters: Mapping[str, Float32], source: str) -> tuple[Code, ...]:
    """Those codes with which the device writes the true values as they are in the file: integers may differ by one."""
    good = list(codes)
    while good:
        again = recode(data, good, parameters, source)
        wrong = {code.parameter for code in good if not _same(data, again, code, source)}
        wrong |= {code.parameter for code in good if code.weight in wrong}
        if not wrong:
            break
        good = [code for code in good if code.parameter not in wrong]
    return tuple(good)


def _same(data: bytes, again: bytes, code: Code, source: str) -> bool:
    before, after = decode(data, code, source), decode(again, code, source)
    if code.dtype == "float16":
        return bool(np.array_equal(before, after))
    scales = [np.frombuffer(one, "<f4", code.channels, code.scales) for one in (data, again)]
    return bool(
        np.allclose(scales[0], scales[1], rtol=1e-6, atol=0)
        and np.abs(before - after).max() <= 1.01 * scales[0].max() + 1e-6 * np.abs(before).max()
    )


def _onnx_layers(path: Path) -> Iterator[Layer]:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    constants = {one.name: one for one in model.graph.initializer}
    offsets = _onnx_offsets(model, path)
    decoders = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}

    def stored(output: str, kind: int) -> Stored | None:
        node = decoders.get(output)
        values = constants.get(node.input[0]) if node is not None else None
        if node is None or values is None or values.data_type != kind or node.input[1] not in constants:
            return None
        if not {node.input[0], node.input[1]} <= set(offsets):
            return None
        axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
        array, scales = numpy_helper.to_array(values), numpy_helper.to_array(constants[node.input[1]])
        places = offsets[node.input[0]], offsets[node.input[1]]
        return Stored(array, places[0], scales.reshape(-1), places[1], axis % max(1, array.ndim))

    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            weight = stored(node.input[1], onnx.TensorProto.INT8)
            bias = stored(node.input[2], onnx.TensorProto.INT32) if len(node.input) > 2 else None
            if weight is not None:
                yield Layer(weight, bias)


def _onnx_offsets(model: Any, path: Path) -> dict[str, int]:
    """Where the bytes of each constant lie: the same file is written with other bytes in it, that occur once."""
    data = path.read_bytes()
    marked = type(model)()
    marked.CopyFrom(model)
    rng = np.random.default_rng(_SEED)
    for one in marked.graph.initializer:
        one.raw_data = rng.bytes(len(one.raw_data))
    written = marked.SerializeToString(deterministic=True)
    if len(written) != len(data):
        return {}
    return {
        one.name: written.index(one.raw_data)
        for one in marked.graph.initializer
        if len(one.raw_data) >= np.dtype("<f4").itemsize and written.count(one.raw_data) == 1
    }


def _tflite_layers(data: bytes) -> Iterator[Layer]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)
    start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    kinds = {schema.TensorType.INT8: "i1", schema.TensorType.INT32: "<i4"}
    layers = {getattr(schema.BuiltinOperator, name) for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")}

    def place_of(view: NDArray[Any]) -> int:
        return int(view.__array_interface__["data"][0] - start)

    def stored(index: int, kind: int) -> Stored | None:
        tensor = graph.Tensors(index) if index >= 0 else None
        if tensor is None or tensor.Type() != kind:
            return None
        buffer, quantised = model.Buffers(tensor.Buffer()), tensor.Quantization()
        if quantised is None or quantised.ScaleLength() == 0 or not (buffer.DataLength() or buffer.Size()):
            return None
        # Larger constants lie behind the model, at an offset in the file.
        offset = place_of(buffer.DataAsNumpy()) if buffer.DataLength() else buffer.Offset()
        shape, scales = tensor.ShapeAsNumpy(), quantised.ScaleAsNumpy()
        values = np.frombuffer(data, kinds[kind], int(np.prod(shape)), offset).reshape(shape)
        axis = quantised.QuantizedDimension()
        return Stored(values, offset, np.asarray(scales, np.float32), place_of(scales), axis)

    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        code = model.OperatorCodes(operator.OpcodeIndex())
        if max(code.BuiltinCode(), code.DeprecatedBuiltinCode()) in layers:
            inputs = [int(one) for one in operator.InputsAsNumpy()]
            weight = stored(inputs[1], schema.TensorType.INT8)
            bias = stored(inputs[2], schema.TensorType.INT32) if len(inputs) > 2 else None
            if weight is not None:
                yield Layer(weight, bias)


def unlisted(codes: Sequence[Code], wanted: Mapping[str, Any], patched: Sequence[str] = ()) -> dict[str, str]:
    """For every wanted parameter that a file has no place for, why."""
    known = {*patched, *(code.parameter for code in codes)}
    return {name: "it is not quantised as the device would do it" for name in wanted if name not in known}
