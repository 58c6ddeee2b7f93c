"""Rules of operators that compute without weights of several axes: elementwise, reductions, resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kiridashi_server.graph.dims import ONE, Dims, broadcast, freeze, freeze_all, fresh, is_frozen, size_of, unify
from kiridashi_server.graph.rules import Call, Result, rule

# --- elementwise ------------------------------------------------------------------------------------------


@rule(
    *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "neg", "abs", "exp", "log", "log1p"),
    *("sqrt", "rsqrt", "square", "reciprocal", "erf", "sin", "cos", "tanh", "sigmoid", "relu", "relu6", "expm1"),
    *("hardtanh", "clamp", "clamp_min", "clamp_max", "silu", "gelu", "mish", "elu", "selu", "celu", "softplus"),
    *("leaky_relu", "hardswish", "hardsigmoid", "log_sigmoid", "softsign", "dropout", "feature_dropout"),
    *("contiguous", "clone", "alias", "detach", "lift_fresh_copy", "masked_fill", "atan2", "addcmul", "lerp"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or"),
    *("__and__", "__or__", "__xor__"),
    *("bitwise_not", "floor", "ceil", "round", "sign", "floor_divide", "remainder", "atan", "isnan", "nan_to_num"),
    *("fmod", "trunc", "frac", "exp2", "log2", "log10", "erfc", "tan", "sinh", "cosh", "asin", "acos", "asinh"),
    *("acosh", "atanh", "logit", "hypot", "softshrink", "hardshrink", "threshold", "alpha_dropout", "copy", "fill"),
    *("feature_alpha_dropout", "logical_xor", "bitwise_xor", "isinf"),
)
def elementwise(call: Call) -> Result | None:
    """The operator treats every element alike, after broadcasting its tensor arguments.

    A constant that the graph computes, such as positions from sines, may have channels that are frozen; they
    are picked instead of freezing what they meet.
    """
    operands = {name: dims for name, value in call.arguments.items() if (dims := call.dims_of(value)) is not None}
    constants = {name: dims for name, dims in operands.items() if call.is_constant(call.arguments[name])}
    if not operands or len(constants) in (0, len(operands)):
        return broadcast(list(operands.values())) if operands else None
    result = broadcast([dims for name, dims in operands.items() if name not in constants])
    for name, dims in constants.items():
        for axis in range(-min(len(dims), len(result)), 0):
            if size_of(dims[axis]) == size_of(result[axis]) and is_frozen(dims[axis]) and not is_frozen(result[axis]):
                call.picks(name, axis, result[axis])
            else:
                result[axis] = broadcast([[result[axis]], [dims[axis]]])[0]
    longest = max(constants.values(), key=len)
    return [*longest[: len(longest) - len(result)], *result] if len(longest) > len(result) else result


@rule("prelu")
def prelu(call: Call) -> Result | None:
    """One slope for each channel, or one for all."""
    source, slope = call.dims("self"), call.dims("weight")
    if source is None or slope is None:
        return None
    if size_of(slope[0]) > 1:
        unify(slope[0], source[1])
    return source


@rule("to", "_to_copy", "type_as", "zeros_like", "ones_like", "full_like")
def recast(call: Call) -> Result | None:
    """The result has the shape of the first argument, whatever the others say."""
    source = call.dims("self")
    return call.dims("input") if source is None else source


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def create(call: Call) -> Result | None:
    """A constant of the shape asked for; of the first argument only dtype and device are taken."""
    return [fresh(size, "a constant's size") for size in call.shape]


# --- reductions -------------------------------------------------------------------------------------------


@rule("mean", "sum", "linalg_vector_norm")
def summing_reduction(call: Call) -> Result | None:
    """The reduced dimensions are read: a zero adds nothing to a sum, a mean (its divisor kept) or a norm."""
    source = call.dims("self")
    if source is None:
        return None
    reduced = _reduced(call, source)
    for axis in reduced:
        if call.name == "linalg_vector_norm" and not 0 < call.arguments["ord"] < math.inf:
            freeze(source[axis], "reduced (norm)")
        call.reads("self", axis - len(source), source[axis])
        if call.name == "mean":
            call.averages(source[axis])
    return _without(call, source, reduced)


@rule("cumsum", "cumprod", "logcumsumexp")
def running(call: Call) -> Result | None:
    """Along one dimension, every index depends on those before it."""
    source = call.dims("self")
    if source is None:
        return None
    freeze(source[call.arguments["dim"]], f"reduced ({call.name})")
    return source


@rule("amax", "amin", "var", "std", "argmax", "argmin", "any", "all", "prod")
def reduction(call: Call) -> Result | None:
    """The reduced dimensions must stay whole."""
    source = call.dims("self")
    if source is None:
        return None
    reduced = _reduced(call, source)
    for axis in reduced:
        freeze(source[axis], f"reduced ({call.name})")
    return _without(call, source, reduced)


def _reduced(call: Call, source: Dims) -> list[int]:
    axes = call.arguments.get("dim")
    named = range(len(source)) if axes is None or axes == [] else axes if isinstance(axes, Sequence) else [axes]
    return sorted({axis % len(source) for axis in named})


def _without(call: Call, source: Dims, reduced: Sequence[int]) -> Dims:
    if len(call.shape) == len(source):
        return [ONE if axis in reduced else dim for axis, dim in enumerate(source)]
    return [dim for axis, dim in enumerate(source) if axis not in reduced]


# --- positions --------------------------------------------------------------------------------------------


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


@rule("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "upsample_nearest3d", "upsample_trilinear3d")
def positions_3d(call: Call) -> Result | None:
    """The last three dimensions are resampled."""
    return _positions(call, 3)


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def positions_and_places(call: Call) -> Result | None:
    """Maxima of regions, and where they were."""
    source = call.dims("self")
    if source is None:
        return None
    trailing = len(call.arguments.get("output_size", call.arguments.get("kernel_size")))
    freeze_all(source[-trailing:], "position")
    return tuple(
        [*source[:-trailing], *(fresh(size, "position") for size in shape[-trailing:])] for shape in call.shapes
    )


@rule("grid_sampler")
def grid_sample(call: Call) -> Result | None:
    """Positions are sampled where another tensor says; channels are passed on."""
    source, grid = call.dims("input"), call.dims("grid")
    if source is None or grid is None:
        return None
    freeze_all([*source[2:], *grid[1:]], "sampled")
    return [broadcast([source[:1], grid[:1]])[0], source[1], *grid[1:-1]]


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Result | None:
    """Channels are (channel, place in the cell); the places become positions."""
    source = call.dims("self")
    if source is None or len(source) < 3:
        return None
    freeze_all(source[-2:], "position")
    channels = fresh(call.shape[-3])
    unify(source[-3], channels + fresh(call.arguments["upscale_factor"] ** 2, "becomes positions"))
    return [*source[:-3], channels, *(fresh(size, "position") for size in call.shape[-2:])]


@rule("pixel_unshuffle", "im2col")
def cells_to_channels(call: Call) -> Result | None:
    """Positions become channels: (channel, place in the cell)."""
    source = call.dims("self")
    if source is None or len(source) != 4:
        return None
    freeze_all(source[-2:], "position")
    places = call.shape[1] // size_of(source[1])
    return [
        source[0],
        source[1] + fresh(places, "was positions"),
        *(fresh(size, "position") for size in call.shape[2:]),
    ]


@rule("col2im")
def channels_to_cells(call: Call) -> Result | None:
    """Channels (channel, place in the cell) become positions, where they are added up."""
    source = call.dims("self")
    if source is None or len(source) != 3:
        return None
    freeze(source[2], "position")
    channels = fresh(call.shape[1])
    unify(source[1], channels + fresh(size_of(source[1]) // call.shape[1], "becomes positions"))
    return [source[0], channels, *(fresh(size, "position") for size in call.shape[2:])]


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
