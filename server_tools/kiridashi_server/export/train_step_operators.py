"""What each aten operator of a traced train step becomes in ONNX.

One table, one small function a kind of operator. Operators that stand in the table are left whole when the
step is traced (activations' and convolutions' gradients among them, which ONNX can say more shortly than
aten); all others are decomposed by torch first, and one that is still not in the table is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch

from kiridashi_server.export import train_step_convolution as spatial
from kiridashi_server.export import train_step_shapes as shapes
from kiridashi_server.export.train_step_emitter import Call, Names, numpy_dtype

Converter: TypeAlias = Callable[[Call], Names]

aten = torch.ops.aten
_ONNX_TYPE = {torch.float32: 1, torch.int64: 7, torch.bool: 9}


def _unary(operator: str) -> Converter:
    return lambda call: call.emitter.node(operator, call.value("self"))


def _binary(operator: str) -> Converter:
    return lambda call: call.emitter.node(operator, call.value("self"), call.value("other"))


def _scaled(operator: str) -> Converter:
    """``self + alpha other`` and ``self - alpha other``."""

    def convert(call: Call) -> Names:
        other = call.value("other")
        if call.arguments["alpha"] != 1:
            other = call.emitter.node("Mul", other, call.number(call.arguments["alpha"]))
        return call.emitter.node(operator, call.value("self"), other)

    return convert


def _pass_through(call: Call) -> Names:
    return call.value("self")


def _power(call: Call) -> Names:
    exponent = call.number(call.arguments["exponent"])
    return call.emitter.node("Pow", call.value("self"), exponent)


def _inverse_root(call: Call) -> Names:
    return call.emitter.node("Reciprocal", call.emitter.node("Sqrt", call.value("self")))


def _clip(call: Call, low: float | None, high: float | None) -> str:
    bounds = ["" if bound is None else call.number(bound) for bound in (low, high)]
    return call.emitter.node("Clip", call.value("self"), *bounds)


def _clamp(call: Call) -> Names:
    return _clip(call, call.arguments["min"], call.arguments["max"])


def _hardtanh(call: Call) -> Names:
    return _clip(call, call.arguments["min_val"], call.arguments["max_val"])


def _hardtanh_backward(call: Call) -> Names:
    """``g`` where the output lies strictly between the bounds, as torch has it, else 0.

    Said through the sign of ``(y - low) (high - y)``: the clipped output is there already, so the input need
    not be kept, and the product is faster in the runtime than two comparisons and a choice.
    """
    emitter = call.emitter
    low, high = call.arguments["min_val"], call.arguments["max_val"]
    clipped = _clip(call, low, high)
    above = emitter.node("Sub", clipped, call.number(low)) if low else clipped
    inside = emitter.node("Mul", above, emitter.node("Sub", call.number(high), clipped))
    return emitter.node("Mul", call.value("grad_output"), emitter.node("Sign", inside))


def _threshold_backward(call: Call) -> Names:
    """The gradient of relu and its kin: ``g`` where ``self`` is above the threshold."""
    passed = call.emitter.node("Greater", call.value("self"), call.number(call.arguments["threshold"]))
    return call.emitter.node(
        "Mul", call.value("grad_output"), call.emitter.node("Cast", passed, to=_ONNX_TYPE[torch.float32])
    )


def _leaky_relu(call: Call) -> Names:
    return call.emitter.node("LeakyRelu", call.value("self"), alpha=float(call.arguments["negative_slope"]))


def _silu(call: Call) -> Names:
    return call.emitter.node("Mul", call.value("self"), call.emitter.node("Sigmoid", call.value("self")))


def _gelu(call: Call) -> Names:
    return call.emitter.node("Gelu", call.value("self"), approximate=call.arguments["approximate"])


def _log_softmax(call: Call) -> Names:
    return call.emitter.node("LogSoftmax", call.value("self"), axis=call.arguments["dim"])


def _softmax(call: Call) -> Names:
    return call.emitter.node("Softmax", call.value("self"), axis=call.arguments["dim"])


def _reduced(operator: str) -> Converter:
    def convert(call: Call) -> Names:
        axes = call.arguments.get("dim")
        axes = [axes] if isinstance(axes, int) else list(axes or range(call.tensor("self").dim()))
        keep = int(bool(call.arguments.get("keepdim", False)))
        if not axes:
            return call.value("self")
        return call.emitter.node(operator, call.value("self"), call.emitter.integers(*axes), keepdims=keep)

    return convert


def _addmm(call: Call) -> Names:
    return call.emitter.node(
        "Gemm",
        call.value("mat1"),
        call.value("mat2"),
        call.value("self"),
        alpha=float(call.arguments["alpha"]),
        beta=float(call.arguments["beta"]),
    )


def _product(call: Call) -> Names:
    return call.emitter.node("MatMul", call.value("self"), call.value("mat2"))


def _dot(call: Call) -> Names:
    if call.arguments["self"] is call.arguments["tensor"]:
        return call.emitter.node("ReduceSumSquare", call.value("self"), keepdims=0)
    return call.emitter.node("MatMul", call.value("self"), call.value("tensor"))


def _layer_norm(call: Call) -> Names:
    """Normalised values, mean and inverse deviation, as the backward pass wants them."""
    shape = call.arguments["normalized_shape"]
    scale = call.arguments["weight"]
    inputs = [call.value("input"), _all_ones(call, shape) if scale is None else call.value("weight")]
    if call.arguments["bias"] is not None:
        inputs.append(call.value("bias"))
    return call.emitter.nodes("LayerNormalization", inputs, 3, axis=-len(shape), epsilon=float(call.arguments["eps"]))


def _all_ones(call: Call, shape: list[int]) -> str:
    return call.emitter.constant(np.ones(shape, dtype=np.float32))


def _chosen(call: Call) -> Names:
    return call.emitter.node("Where", call.value("condition"), call.value("self"), call.value("other"))


def _filled(call: Call) -> Names:
    """full, full_like, scalar_tensor: one number, spread over the result's shape."""
    names = ("fill_value", "s")
    value = next((call.arguments[name] for name in names if name in call.arguments), 0.0)
    number = call.emitter.constant(np.asarray(value, dtype=numpy_dtype(call.node.meta["val"].dtype)))
    if math.prod(call.result_shape) == 1 and not call.result_shape:
        return number
    return call.emitter.node("Expand", number, call.emitter.integers(*call.result_shape))


def _cast(call: Call) -> Names:
    target = call.node.meta["val"].dtype
    if target == call.tensor("self").dtype:
        return call.value("self")
    if target not in _ONNX_TYPE:
        raise call.unsupported(f"values of {target} are not used in a train step")
    return call.emitter.node("Cast", call.value("self"), to=_ONNX_TYPE[target])


def _denied(operator: str) -> Converter:
    """Comparisons that ONNX only has in the negative."""
    return lambda call: call.emitter.node("Not", call.emitter.node(operator, call.value("self"), call.value("other")))


def _any(call: Call) -> Names:
    """Whether any value along the axis is true."""
    as_number = call.emitter.node("Cast", call.value("self"), to=_ONNX_TYPE[torch.float32])
    axes = call.emitter.integers(call.arguments["dim"])
    most = call.emitter.node("ReduceMax", as_number, axes, keepdims=int(call.arguments["keepdim"]))
    return call.emitter.node("Cast", most, to=_ONNX_TYPE[torch.bool])


CONVERTERS: Mapping[object, Converter] = {
    aten.convolution.default: spatial.convolution,
    aten.convolution_backward.default: spatial.convolution_backward,
    aten.max_pool2d_with_indices.default: spatial.max_pool,
    aten.max_pool2d_with_indices_backward.default: spatial.max_pool_backward,
    aten.avg_pool2d.default: spatial.average_pool,
    aten.avg_pool2d_backward.default: spatial.average_pool_backward,
    aten.add.Tensor: _scaled("Add"),
    aten.add.Scalar: _scaled("Add"),
    aten.sub.Tensor: _scaled("Sub"),
    aten.sub.Scalar: _scaled("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.div.Scalar: _binary("Div"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.pow.Tensor_Scalar: _power,
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.sign.default: _unary("Sign"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.rsqrt.default: _inverse_root,
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.erf.default: _unary("Erf"),
    aten.tanh.default: _unary("Tanh"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.relu.default: _unary("Relu"),
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.threshold_backward.default: _threshold_backward,
    aten.leaky_relu.default: _leaky_relu,
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten.sum.default: _reduced("ReduceSum"),
    aten.sum.dim_IntList: _reduced("ReduceSum"),
    aten.mean.default: _reduced("ReduceMean"),
    aten.mean.dim: _reduced("ReduceMean"),
    aten.amax.default: _reduced("ReduceMax"),
    aten.any.dim: _any,
    aten.addmm.default: _addmm,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.dot.default: _dot,
    aten.view.default: shapes.reshaped,
    aten._unsafe_view.default: shapes.reshaped,
    aten.squeeze.dim: shapes.reshaped,
    aten.squeeze.dims: shapes.reshaped,
    aten.unsqueeze.default: shapes.reshaped,
    aten.expand.default: shapes.expanded,
    aten.permute.default: shapes.permuted,
    aten.transpose.int: shapes.transposed,
    aten.t.default: shapes.transposed,
    aten.alias.default: _pass_through,
    aten.clone.default: _pass_through,
    aten.detach.default: _pass_through,
    aten.cat.default: shapes.concatenated,
    aten.split_with_sizes.default: shapes.split,
    aten.slice.Tensor: shapes.sliced,
    aten.slice_backward.default: shapes.slice_backward,
    aten.select_backward.default: shapes.select_backward,
    aten.select.int: shapes.selected,
    aten.constant_pad_nd.default: shapes.padded,
    aten.native_layer_norm.default: _layer_norm,
    aten.where.self: _chosen,
    aten.full.default: _filled,
    aten.full_like.default: _filled,
    aten.scalar_tensor.default: _filled,
    aten._to_copy.default: _cast,
    aten.eq.Scalar: _binary("Equal"),
    aten.eq.Tensor: _binary("Equal"),
    aten.ne.Scalar: _denied("Equal"),
    aten.le.Scalar: _binary("LessOrEqual"),
    aten.le.Tensor: _binary("LessOrEqual"),
    aten.lt.Scalar: _binary("Less"),
    aten.lt.Tensor: _binary("Less"),
    aten.ge.Scalar: _binary("GreaterOrEqual"),
    aten.ge.Tensor: _binary("GreaterOrEqual"),
    aten.gt.Scalar: _binary("Greater"),
    aten.gt.Tensor: _binary("Greater"),
    aten.logical_not.default: _unary("Not"),
    aten.logical_and.default: _binary("And"),
    aten.bitwise_and.Tensor: _binary("And"),
    aten.bitwise_or.Tensor: _binary("Or"),
}
"""One function for every operator that a train step may consist of."""
