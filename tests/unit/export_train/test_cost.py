from __future__ import annotations

import numpy as np
from kiridashi.manifest import Patch
from kiridashi_server.export.train_step_cost import NODE_BYTES, step_cost
from kiridashi_server.export.train_step_emitter import Emitter, Output
from kiridashi_server.export.train_step_variants import share_weights
from onnx import TensorProto


def test_values_are_counted_from_where_they_are_made_to_their_last_reader() -> None:
    emitter = Emitter()
    weight = emitter.initializer("w", np.ones((8, 8), np.float32))
    first = emitter.node("MatMul", "x", weight)
    second = emitter.node("Relu", first)
    third = emitter.node("Reshape", emitter.node("Exp", second), emitter.integers(32))
    cost = step_cost(emitter.build({"x": (4, 8)}, {"out": Output(third, (32,))}))
    assert cost.macs == 4 * 8 * 8
    assert cost.moved_bytes == 2 * 2 * 128
    fixed = 128 + 256 + 4  # x, w, and the shape, counted like four bytes an element
    assert cost.peak_bytes == fixed + 5 * NODE_BYTES + 2 * 128  # never more than two of the three values at once


def test_frozen_weights_become_references_where_the_bytes_are_the_same() -> None:
    rng = np.random.default_rng(0)
    same, turned, other = (rng.standard_normal((8, 16)).astype(np.float32) for _ in range(3))
    emitter = Emitter()
    for name, value in (("same", same), ("turned", turned), ("other", other)):
        emitter.initializer(name, value)
    product = emitter.node("Add", emitter.node("Add", "same", "turned"), "other")
    proto = emitter.build({"x": (8, 16)}, {"out": Output(emitter.node("Add", product, "x"), (8, 16))})
    data = b"xyz" + same.tobytes() + turned.T.tobytes() + bytes(512)
    places = {
        "same": Patch("same", 3, (8, 16)),
        "turned": Patch("turned", 515, (8, 16), transposed=True),
        "other": Patch("other", 1027, (8, 16)),
    }
    share_weights(proto, "model.onnx", data, places)
    outside = {
        value.name: {entry.key: entry.value for entry in value.external_data}
        for value in proto.graph.initializer
        if value.data_location == TensorProto.EXTERNAL
    }
    assert outside == {
        "same": {"location": "model.onnx", "offset": "3", "length": "512"},
        "stored.turned": {"location": "model.onnx", "offset": "515", "length": "512"},
    }
    assert [node.op_type for node in proto.graph.node].count("Transpose") == 1
