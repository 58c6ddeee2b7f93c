"""The graph under construction: nothing twice, nothing unused, always the same bytes."""

import numpy as np
import onnx
from kiridashi_server.export.train_step_emitter import Emitter, Output


def _square_of_sum(emitter: Emitter) -> str:
    total = emitter.node("Add", "a", emitter.constant(np.ones(2, np.float32)))
    emitter.node("Exp", total)  # read by nothing
    again = emitter.node("Add", "a", emitter.constant(np.ones(2, np.float32)))
    return emitter.node("Mul", total, again)


def test_equal_nodes_and_constants_are_made_once_and_unread_ones_left_out() -> None:
    emitter = Emitter()
    emitter.initializer("unread", np.zeros(3, np.float32))
    model = emitter.build({"a": (2,)}, {"b": Output(_square_of_sum(emitter), (2,))})
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add", "Mul", "Identity"]
    assert [value.name for value in model.graph.initializer] == ["constant_1"]


def test_nodes_that_differ_in_an_attribute_are_both_made() -> None:
    emitter = Emitter()
    assert emitter.node("Softmax", "a", axis=0) != emitter.node("Softmax", "a", axis=1)
    assert emitter.node("Softmax", "a", axis=0) == emitter.node("Softmax", "a", axis=0)


def test_a_scalar_stays_a_scalar() -> None:
    emitter = Emitter()
    name = emitter.constant(np.asarray(2.0, np.float32))
    model = emitter.build({}, {"b": Output(emitter.node("Neg", name), ())})
    assert list(model.graph.initializer[0].dims) == []


def test_scalars_of_different_types_are_not_confused() -> None:
    emitter = Emitter()
    assert emitter.constant(np.zeros((), np.float32)) != emitter.constant(np.zeros((), np.int32))
    assert emitter.constant(np.zeros(1, np.float32)) != emitter.constant(np.zeros((), np.float32))


def test_same_calls_same_bytes() -> None:
    def build() -> bytes:
        emitter = Emitter()
        data: bytes = emitter.build({"a": (2,)}, {"b": Output(_square_of_sum(emitter), (2,))}).SerializeToString()
        return data

    assert build() == build()
