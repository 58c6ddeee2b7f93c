"""Model files with inputs that no line has: several, of open size, of other number formats, or no numbers at all."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import onnx
from ai_edge_litert import schema_py_generated as tflite
from onnx import TensorProto, helper


def write_onnx(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list]], kind: int) -> Path:
    """A graph whose output ``out`` is of ``kind``; inputs are name -> (number format, shape)."""
    values = [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    out = helper.make_tensor_value_info("out", kind, None)
    graph = helper.make_graph(nodes, "odd", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def two_inputs_onnx(path: Path) -> Path:
    """``tokens`` int64 [batch, length] looked up in ``table`` float32 [10, 4]."""
    nodes = [helper.make_node("Gather", ["table", "tokens"], ["out"])]
    inputs = {"tokens": (TensorProto.INT64, ["batch", "length"]), "table": (TensorProto.FLOAT, [10, 4])}
    return write_onnx(path, nodes, inputs, TensorProto.FLOAT)


def segmenter_onnx(path: Path) -> Path:
    """An RGB image [n, 3, h, w] of open size, and as many values out: no classifier."""
    inputs = {"image": (TensorProto.FLOAT, ["n", 3, "h", "w"])}
    return write_onnx(path, [helper.make_node("Relu", ["image"], ["out"])], inputs, TensorProto.FLOAT)


def of_kind_onnx(path: Path, kind: int) -> Path:
    """One input ``x`` [2] of a number format, passed through."""
    return write_onnx(path, [helper.make_node("Identity", ["x"], ["out"])], {"x": (kind, [2])}, kind)


def sequence_onnx(path: Path) -> Path:
    """An input that is a sequence of tensors."""
    item = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    entry = helper.make_value_info("parts", helper.make_sequence_type_proto(item))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    node = helper.make_node("ConcatFromSequence", ["parts"], ["out"], axis=0)
    graph = helper.make_graph([node], "odd", [entry], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def sum_tflite(path: Path, kind: int = tflite.TensorType.FLOAT32) -> Path:
    """``left`` [open, 4] plus ``right`` [open, 4]."""
    tensors = []
    for name in ("left", "right", "out"):
        tensor = tflite.TensorT()
        tensor.name, tensor.shape, tensor.shapeSignature, tensor.type = name.encode(), [1, 4], [-1, 4], kind
        tensors.append(tensor)
    code, operator, graph, model = tflite.OperatorCodeT(), tflite.OperatorT(), tflite.SubGraphT(), tflite.ModelT()
    code.builtinCode = code.deprecatedBuiltinCode = tflite.BuiltinOperator.ADD
    code.version = 1
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1], [2]
    operator.builtinOptionsType, operator.builtinOptions = tflite.BuiltinOptions.AddOptions, tflite.AddOptionsT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, [operator], [0, 1], [2]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [tflite.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path
