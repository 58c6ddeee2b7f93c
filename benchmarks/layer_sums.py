"""The sum of a network's layers, each measured alone: a predictor to compare with, and one that misleads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

_RUNS = 30
_COMPUTING = frozenset({"Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "ReduceMean", "Clip", "Relu"})


def layer_sum_ms(path: Path) -> float:
    """Milliseconds of all computing nodes of an ONNX model, each in a session of its own, the quickest run of 30."""
    model = onnx.shape_inference.infer_shapes(_with_batch_of_one(onnx.load(str(path))))
    return sum(_quickest_ms(single) for single in _single_nodes(model))


def _with_batch_of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def _single_nodes(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    for node in graph.node:
        outputs = [values[name] for name in node.output if name in values]
        if node.op_type in _COMPUTING and outputs:
            inputs = [values[name] for name in node.input if name in values]
            held = [constants[name] for name in node.input if name in constants]
            single = onnx.helper.make_graph([node], "layer", inputs, outputs, held)
            yield onnx.helper.make_model(single, opset_imports=model.opset_import, ir_version=model.ir_version)


def _quickest_ms(model: onnx.ModelProto) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: np.zeros(entry.shape, dtype=np.float32) for entry in session.get_inputs()}
    times = []
    for _ in range(_RUNS):
        before = time.thread_time_ns()
        session.run(None, feeds)
        times.append(time.thread_time_ns() - before)
    return min(times) / 1e6
