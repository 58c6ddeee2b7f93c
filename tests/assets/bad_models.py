"""ONNX files that do harm when they run; each takes the tiny bundle's frames and claims to give its logits."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import CLASSES, SIDE

_OPSET = helper.make_opsetid("", 17)


def never_ending() -> bytes:
    """Counts to 10 to the power of 15 before it answers."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going_on"], ["goes_on"]),
            helper.make_node("Add", ["sum", "one"], ["grown"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", CLASSES]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("grown", TensorProto.FLOAT, ["n", CLASSES]),
        ],
    )
    loop = helper.make_node("Loop", ["rounds", "yes", "flat"], ["logits"], body=body)
    return _model([loop], rounds=np.array(10**15, np.int64), yes=np.array(True), one=np.ones((), np.float32))


def greedy(mib: int) -> bytes:
    """Fills ``mib`` MiB while it answers."""
    nodes = [
        helper.make_node("Expand", ["flat_one", "much"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["none"]),
        helper.make_node("Add", ["flat", "none"], ["logits"]),
    ]
    first = helper.make_node("ReduceMax", ["input"], ["flat_one"], keepdims=0)
    return _model([first, *nodes], much=np.array([mib, 1 << 18], np.int64), nothing=np.zeros((), np.float32))


def _model(nodes: list, **constants: np.ndarray) -> bytes:
    flatten = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
        helper.make_node("Mul", ["column", "row"], ["flat"]),
    ]
    constants |= {"last": np.array([1], np.int64), "row": np.ones((1, CLASSES), np.float32)}
    graph = helper.make_graph(
        [*flatten, *nodes],
        "bad",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[_OPSET], ir_version=9).SerializeToString(deterministic=True)
