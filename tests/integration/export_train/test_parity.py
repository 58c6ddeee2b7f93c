"""The check against torch must find a graph that is wrong, even by one per cent in one weight."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.train_step_onnx import to_onnx
from kiridashi_server.export.train_step_parameters import bias_head_parameters
from kiridashi_server.export.train_step_parity import check_gradients
from kiridashi_server.export.train_step_trace import StepSettings, trace_step
from onnx import numpy_helper

Damage = Callable[[onnx.GraphProto], None]


def _settings(model: Classifier) -> StepSettings:
    return StepSettings((3, 16, 16), bias_head_parameters(model, 0.5), 4, 1.0, 0.9)


@pytest.fixture(scope="module")
def graph(tiny: Classifier) -> onnx.ModelProto:
    settings = _settings(tiny)
    step = trace_step(tiny, settings)
    return to_onnx(step.program, settings.inputs, settings.outputs, step.frozen)


def _scale(model: onnx.GraphProto, chosen: Callable[[str, np.ndarray], bool], factor: float) -> None:
    found = 0
    for tensor in model.initializer:
        value = numpy_helper.to_array(tensor)
        if chosen(tensor.name, value):
            tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), tensor.name))
            found += 1
    assert found, "nothing was damaged"


def _frozen_weight(model: onnx.GraphProto) -> None:
    _scale(model, lambda name, _: name == "features.4.0.weight", 1.01)


def _momentum(model: onnx.GraphProto) -> None:
    _scale(model, lambda _, value: value.shape == () and value == np.float32(0.9), 1.01)


def _sign_of_the_update(model: onnx.GraphProto) -> None:
    output = next(node for node in model.node if node.output[0] == "new.head.bias")
    producer = {name: node for node in model.node for name in node.output}
    node = producer[output.input[0]]
    while node.op_type != "Sub":
        node = producer[node.input[0]]
    node.op_type = "Add"


def _norm(model: onnx.GraphProto) -> None:
    node = next(node for node in model.node if node.op_type == "Sqrt")
    node.op_type = "Identity"


def test_a_sound_graph_passes(tiny: Classifier, graph: onnx.ModelProto) -> None:
    parity = check_gradients(tiny, graph.SerializeToString(), _settings(tiny))
    assert parity.passes
    assert 0.0 < parity.gradient_max_rel < 1e-5
    assert parity.loss_max_abs_diff < 2e-6


@pytest.mark.parametrize("damage", [_frozen_weight, _momentum, _sign_of_the_update, _norm])
def test_a_damaged_graph_is_found(tiny: Classifier, graph: onnx.ModelProto, damage: Damage) -> None:
    damaged = onnx.ModelProto()
    damaged.CopyFrom(graph)
    damage(damaged.graph)
    with pytest.raises(ExportError, match="does not do what torch does"):
        check_gradients(tiny, damaged.SerializeToString(), _settings(tiny))


def test_a_graph_of_another_model_is_found(tiny: Classifier, graph: onnx.ModelProto) -> None:
    other = Classifier.with_zero_head(tiny.features, tiny.head.in_features, 4)
    with torch.no_grad():
        next(other.features.parameters()).mul_(1.01)
    with pytest.raises(ExportError, match="does not do what torch does"):
        check_gradients(other, graph.SerializeToString(), _settings(tiny))


def test_a_file_that_is_no_graph_is_refused(tiny: Classifier) -> None:
    with pytest.raises(ExportError, match="cannot load"):
        check_gradients(tiny, b"no graph", _settings(tiny))


def test_the_check_sees_below_a_head_that_is_still_zero(tiny: Classifier) -> None:
    model = Classifier.with_zero_head(tiny.features, tiny.head.in_features, 4)
    settings = _settings(model)
    step = trace_step(model, settings)
    damaged = to_onnx(step.program, settings.inputs, settings.outputs, step.frozen)
    names = [node.name for node in damaged.graph.node if node.op_type == "Sign"]
    assert names, "the activations' gradients are gone"
    for node in damaged.graph.node:
        if node.op_type == "Sign":
            node.op_type = "Relu"
    with pytest.raises(ExportError, match="gradients differ"):
        check_gradients(model, damaged.SerializeToString(), settings)
