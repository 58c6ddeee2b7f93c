"""Rules of operators that compute: elementwise, sums over channels, normalisation, reductions, resampling."""

from __future__ import annotations

from collections.abc import Sequence

from kiridashi_server.graph.dims import ONE, broadcast, freeze, freeze_all, fresh, size_of, unify
from kiridashi_server.graph.rules import Call, Result, rule

KERNEL = "kernel size"


# --- elementwise ------------------------------------------------------------------------------------------


@rule(
    *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "neg", "abs", "exp", "log"),
    *("sqrt", "rsqrt", "square", "reciprocal", "erf", "sin", "cos", "tanh", "sigmoid", "relu", "relu6"),
    *("hardtanh", "clamp", "clamp_min", "clamp_max", "silu", "gelu", "mish", "elu", "selu", "celu", "softplus"),
    *("leaky_relu", "hardswish", "hardsigmoid", "log_sigmoid", "dropout", "feature_dropout"),
    *("contiguous", "clone", "alias", "detach", "lift_fresh_copy", "masked_fill"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
)
def elementwise(call: Call) -> Result | None:
    """The operator treats every element alike, after broadcasting its tensor arguments."""
    operands = [dims for value in call.arguments.values() if (dims := call.dims_of(value)) is not None]
    return broadcast(operands) if operands else None


@rule("to", "_to_copy", "type_as", "zeros_like", "ones_like", "full_like")
def recast(call: Call) -> Result | None:
    """The result has the shape of the first argument, whatever the others say."""
    return call.dims("self") or call.dims("input")


# --- sums over channels -----------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Result | None:
    """Full convolutions read their input channels; depthwise ones pass them on, each to its own outputs."""
    source, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    groups = call.arguments["groups"]
    if source is None or weight is None or len(source) != len(weight) or not isinstance(groups, int):
        return None
    freeze_all(source[2:], "convolved over")
    freeze_all(weight[2:], KERNEL)
    if groups == 1:
        unify(source[1], weight[1])
        call.reads("input", 1 - len(source), source[1])
        call.produces("weight", "filter")
    elif groups == size_of(source[1]):
        outputs = size_of(weight[0]) // groups
        unify(weight[0], source[1] + fresh(outputs, "outputs of one depthwise channel"))
        call.resizes("groups", source[1])
    else:
        freeze_all([source[1], *weight[:2]], "grouped convolution")
    if bias is not None:
        unify(bias[0], weight[0])
    result = [source[0], weight[0], *(fresh(size, "position") for size in call.shape[2:])]
    call.works(*result, *weight[1:])
    return result


@rule("linear")
def linear(call: Call) -> Result | None:
    """The operator reads the last dimension."""
    source, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    if source is None or weight is None or len(weight) != 2:
        return None
    unify(source[-1], weight[1])
    if bias is not None:
        unify(bias[0], weight[0])
    call.reads("input", -1, source[-1])
    call.produces("weight", "node")
    call.works(*source[:-1], *weight)
    return [*source[:-1], weight[0]]


@rule("matmul", "bmm")
def product(call: Call) -> Result | None:
    """The operator reads the inner dimension; leading ones are passed on."""
    left, right = call.dims("self"), call.dims("other") or call.dims("mat2")
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    unify(left[-1], right[-2])
    call.reads("self", -1, left[-1])
    leading = broadcast([left[:-2], right[:-2]])
    call.has_heads(leading)
    call.works(*leading, left[-2], left[-1], right[-1])
    return [*leading, left[-2], right[-1]]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result | None:
    """Heads and value channels are passed on; the query's size sets the scale and must stay."""
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    if query is None or key is None or value is None or call.arguments.get("enable_gqa"):
        return None
    if not len(query) == len(key) == len(value) or len(query) < 3:
        return None
    leading = broadcast([query[:-2], key[:-2], value[:-2]])
    unify(query[-1], key[-1])
    freeze(query[-1], "its size sets the scale of attention")
    unify(key[-2], value[-2])
    freeze(key[-2], "attended over")
    if call.arguments["is_causal"]:
        freeze(query[-2], "its order matters")
    mask = call.dims("attn_mask")
    if mask is not None:
        broadcast([[*leading, query[-2], key[-2]], mask])
    call.has_heads(leading)
    call.works(*leading, query[-2], key[-2], query[-1])
    call.works(*leading, query[-2], key[-2], value[-1])
    return [*leading, query[-2], value[-1]]


# --- normalisation ----------------------------------------------------------------------------------------


@rule("batch_norm")
def batch_norm(call: Call) -> Result | None:
    """Every channel is normalised by itself."""
    source = call.dims("input")
    if source is None or len(source) < 2:
        return None
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = call.dims(name)
        if vector is not None:
            unify(vector[0], source[1])
    return source


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Result | None:
    """The last dimensions are normalised together, so none of their units can go without changing the rest."""
    source = call.dims("input")
    if source is None:
        return None
    normalised = source[-len(call.arguments["normalized_shape"]) :]
    freeze_all(normalised, "layer normalisation")
    for name in ("weight", "bias"):
        for dim, other in zip(call.dims(name) or [], normalised, strict=False):
            unify(dim, other)
    return source


@rule("group_norm")
def group_norm(call: Call) -> Result | None:
    """Channels of one group are normalised together."""
    source = call.dims("input")
    if source is None:
        return None
    freeze_all(source[1:], "group normalisation")
    for name in ("weight", "bias"):
        vector = call.dims(name)
        if vector is not None:
            unify(vector[0], source[1])
    return source


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(call: Call) -> Result | None:
    """One dimension is normalised over."""
    source = call.dims("self")
    if source is None:
        return None
    freeze(source[call.arguments["dim"]], "softmax")
    return source


# --- reductions and positions -----------------------------------------------------------------------------


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm")
def reduction(call: Call) -> Result | None:
    """The reduced dimensions must stay whole."""
    source, axes = call.dims("self"), call.arguments.get("dim")
    if source is None or axes is None:
        return None
    reduced = {axis % len(source) for axis in (axes if isinstance(axes, Sequence) else [axes])}
    for axis in reduced:
        freeze(source[axis], f"reduced ({call.name})")
    if len(call.shape) == len(source):
        return [ONE if axis in reduced else dim for axis, dim in enumerate(source)]
    return [dim for axis, dim in enumerate(source) if axis not in reduced]


def _positions(call: Call, trailing: int) -> Result | None:
    source = call.dims("self") or call.dims("input")
    if source is None or len(source) <= trailing:
        return None
    freeze_all(source[-trailing:], "position")
    return [*source[:-trailing], *(fresh(size, "position") for size in call.shape[-trailing:])]


@rule("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_linear1d")
def positions_1d(call: Call) -> Result | None:
    """The last dimension is resampled."""
    return _positions(call, 1)


@rule("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
@rule("upsample_bicubic2d")
def positions_2d(call: Call) -> Result | None:
    """The last two dimensions are resampled."""
    return _positions(call, 2)


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Result | None:
    """Padded dimensions must stay whole; the others are passed on."""
    source, amounts = call.dims("self"), call.arguments["pad"]
    if source is None or not all(isinstance(amount, int) for amount in amounts):
        return None
    result = list(source)
    for pair in range(len(amounts) // 2):
        if amounts[2 * pair] or amounts[2 * pair + 1]:
            axis = len(source) - 1 - pair
            freeze(source[axis], "padded")
            result[axis] = fresh(call.shape[axis], "padded")
    return result
