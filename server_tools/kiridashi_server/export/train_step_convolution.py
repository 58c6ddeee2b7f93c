"""Convolution and pooling, forward and backward, as ONNX nodes.

For ``y = conv(x, w)`` with stride s, padding p, dilation d and kernel k, the gradient by ``x`` is the
transposed convolution of ``g`` with ``w``. At stride 1 that is an ordinary convolution with ``w`` turned by
180 degrees, its two channel axes swapped, and padding ``d (k - 1) - p``: with a frozen ``w`` the runtime folds
the turning once at load and runs its fastest kernel. The gradient by ``w`` is taken one kernel tap at a time,
``dw[o, i, tap] = sum over samples and places of g[o] x_tap[i]``, but for depthwise weights all taps of a row at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from kiridashi_server.export.train_step_emitter import Call, Names
from kiridashi_server.export.train_step_shapes import reshape

_LOWEST = int(np.iinfo(np.int64).min)
_TILE = 32
"""Most columns of a tile: narrow enough to waste little, wide enough for the runtime's matrix product."""


def convolution(call: Call) -> Names:
    """``aten::convolution``.

    A trained bias of a frozen weight is added by a node of its own: the runtime's fastest convolution, several
    times faster on small maps, wants weight and bias constant.
    """
    arguments = call.arguments
    weight, bias = arguments["weight"], arguments["bias"]
    apart = bias is not None and weight.op == "get_attr" and bias.op != "get_attr"
    inputs = [call.value("input"), call.value("weight")]
    if bias is not None and not apart:
        inputs.append(call.value("bias"))
    transposed = {"output_padding": list(arguments["output_padding"])} if arguments["transposed"] else {}
    result = call.emitter.node(
        "ConvTranspose" if arguments["transposed"] else "Conv",
        *inputs,
        strides=list(arguments["stride"]),
        dilations=list(arguments["dilation"]),
        pads=[*arguments["padding"], *arguments["padding"]],
        group=int(arguments["groups"]),
        **transposed,
    )
    if not apart:
        return result
    column = reshape(call, call.value("bias"), (-1, *[1] * (len(call.result_shape) - 2)))
    return call.emitter.node("Add", result, column)


def convolution_backward(call: Call) -> Names:
    """``aten::convolution_backward``: the gradients that its mask asks for, an empty name for the others."""
    if call.arguments["transposed"]:
        raise call.unsupported("gradients through transposed convolutions are not written")
    by_input, by_weight, by_bias = call.arguments["output_mask"]
    return (
        _by_input(call) if by_input else "",
        _by_weight(call) if by_weight else "",
        sum_over_places(call, call.value("grad_output")) if by_bias else "",
    )


def sum_over_places(call: Call, gradient: str) -> str:
    """Sum a gradient [N, C, ...] over samples and places: [C]."""
    rank = len(call.shape("grad_output"))
    axes = call.emitter.integers(0, *range(2, rank))
    return call.emitter.node("ReduceSum", gradient, axes, keepdims=0)


def _by_input(call: Call) -> str:
    emitter, arguments = call.emitter, call.arguments
    kernel, groups = call.shape("weight")[2:], int(arguments["groups"])
    stride, padding, dilation = arguments["stride"], arguments["padding"], arguments["dilation"]
    sizes, reached = call.shape("input")[2:], call.shape("grad_output")[2:]
    gradient, weight = call.value("grad_output"), call.value("weight")
    lead = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    trail = [
        size + d * (k - 1) - reach - before
        for size, d, k, reach, before in zip(sizes, dilation, kernel, reached, lead, strict=True)
    ]
    if all(s == 1 for s in stride) and min(*lead, *trail) >= 0:
        turned = _turned(call, weight, groups)
        return emitter.node("Conv", gradient, turned, pads=[*lead, *trail], dilations=list(dilation), group=groups)
    rest = [
        size - ((reach - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, reach, s, p, d, k in zip(sizes, reached, stride, padding, dilation, kernel, strict=True)
    ]
    return emitter.node(
        "ConvTranspose",
        gradient,
        weight,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        output_padding=rest,
        group=groups,
    )


def _turned(call: Call, weight: str, groups: int) -> str:
    """The weight [O, I/g, ...] as the backward convolution reads it: [I, O/g, ...], turned by 180 degrees."""
    emitter = call.emitter
    outputs, inputs, *kernel = call.shape("weight")
    if groups == 1:
        weight = emitter.node("Transpose", weight, perm=[1, 0, *range(2, 2 + len(kernel))])
    elif (inputs, outputs) != (1, groups):
        per_group = outputs // groups
        weight = reshape(call, weight, (groups, per_group, inputs, *kernel))
        weight = emitter.node("Transpose", weight, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
        weight = reshape(call, weight, (groups * inputs, per_group, *kernel))
    axes = [2 + axis for axis, size in enumerate(kernel) if size > 1]
    if not axes:
        return weight
    ends = emitter.integers(*[_LOWEST] * len(axes))
    backwards = emitter.integers(*[-1] * len(axes))
    return emitter.node("Slice", weight, backwards, ends, emitter.integers(*axes), backwards)


def _by_weight(call: Call) -> str:
    outputs, inputs, *kernel = call.shape("weight")
    groups = int(call.arguments["groups"])
    if inputs == 1 and outputs == groups and len(kernel) == 2 and all(d == 1 for d in call.arguments["dilation"]):
        return _depthwise_by_weight(call)
    products = [_matrix_product(call, _tap(call, place)) for place in itertools.product(*map(range, kernel))]
    columns = [reshape(call, product, (outputs * inputs, 1)) for product in products]
    joined = call.emitter.node("Concat", *columns, axis=1) if len(columns) > 1 else columns[0]
    return reshape(call, joined, (outputs, inputs, *kernel))


def _depthwise_by_weight(call: Call) -> str:
    """The gradient by a depthwise weight, as products of tiles of rows.

    With the columns of the input in tiles (``x``, overlapping by the kernel) and those of ``g`` in tiles too, the
    product over samples, rows and tiles ``x^T g`` holds every pair of an input and an output column; the sums of its
    diagonals are the taps of one kernel row.
    """
    emitter = call.emitter
    samples, channels = call.shape("input")[:2]
    (rows, columns), (k, m) = call.shape("grad_output")[2:], call.shape("weight")[2:]
    step, across = (int(s) for s in call.arguments["stride"])
    count = -(-columns // _TILE)
    tile = -(-columns // count)
    reach = (tile - 1) * across + m
    filled = step * (rows + (k - 1) // step)
    source = _tiles(call, (filled, count, tile * across), reach)
    gradient = (
        emitter.node("Pad", call.value("grad_output"), emitter.integers(*[0] * 7, count * tile - columns))
        if count * tile > columns
        else call.value("grad_output")
    )
    gradient = reshape(call, gradient, (samples, channels, rows * count, tile))
    source = reshape(call, source, (samples, channels, filled // step, step, count * reach))
    found = []
    for row in range(k):
        first, phase = divmod(row, step)
        part = emitter.node(
            "Slice",
            source,
            emitter.integers(first, phase),
            emitter.integers(first + rows, phase + 1),
            emitter.integers(2, 3),
        )
        part = reshape(call, part, (samples, channels, rows * count, reach))
        product = emitter.node("MatMul", emitter.node("Transpose", part, perm=[0, 1, 3, 2]), gradient)
        found.append(reshape(call, product, (samples, channels, 1, reach * tile)))
    pairs = emitter.node("Concat", *found, axis=2) if len(found) > 1 else found[0]
    ones = np.equal(
        np.arange(reach)[:, None, None], np.arange(tile)[None, :, None] * across + np.arange(m)[None, None, :]
    )
    diagonals = emitter.constant(ones.astype(np.float32).reshape(reach * tile, m))
    sums = emitter.node("MatMul", pairs, diagonals)
    if samples > 1:
        sums = emitter.node("ReduceSum", sums, emitter.integers(0), keepdims=0)
    return reshape(call, sums, (channels, 1, k, m))


def _tiles(call: Call, sizes: tuple[int, int, int], reach: int) -> str:
    """The padded input [N, C, rows, tiles, reach]: ``reach`` columns from every ``sizes[2]``-th on."""
    emitter = call.emitter
    (samples, channels, height, width), (top, left) = call.shape("input"), call.arguments["padding"]
    rows, count, apart = sizes
    after = (rows - height - top, (count + 1) * apart - width - left)
    padded = emitter.node("Pad", call.value("input"), emitter.integers(0, 0, top, left, 0, 0, *after))
    cut = reshape(call, padded, (samples, channels, rows, count + 1, apart))

    def columns(first: int, end: int) -> str:
        starts, ends = emitter.integers(first, 0), emitter.integers(first + count, end)
        return emitter.node("Slice", cut, starts, ends, emitter.integers(3, 4))

    if reach <= apart:
        return columns(0, reach)
    return emitter.node("Concat", columns(0, apart), columns(1, reach - apart), axis=4)


def _tap(call: Call, place: Sequence[int]) -> str:
    """The part of the padded input that one kernel tap reads: [N, I, *places of the output].

    With a stride the input is first sorted into phases, once for all taps: the runtime's slices with a step are slow.
    """
    emitter, arguments = call.emitter, call.arguments
    stride, padding, dilation = arguments["stride"], arguments["padding"], arguments["dilation"]
    samples, channels, *sizes = call.shape("input")
    reached, rank = call.shape("grad_output")[2:], len(stride)
    starts = [step * d for step, d in zip(place, dilation, strict=True)]
    last = [(k - 1) * d for k, d in zip(call.shape("weight")[2:], dilation, strict=True)]
    lengths = [r + end // s for r, end, s in zip(reached, last, stride, strict=True)]
    after = [n * s - size - p for n, s, size, p in zip(lengths, stride, sizes, padding, strict=True)]
    source = call.value("input")
    if any(padding) or any(after):
        source = emitter.node("Pad", source, emitter.integers(0, 0, *padding, 0, 0, *after))
    if any(s > 1 for s in stride):
        apart = [extent for pair in zip(lengths, stride, strict=True) for extent in pair]
        source = reshape(call, source, (samples, channels, *apart))
        phases, steps = range(3, 3 + 2 * rank, 2), range(2, 2 + 2 * rank, 2)
        source = emitter.node("Transpose", source, perm=[*phases, 0, 1, *steps])
    else:
        source = reshape(call, source, (*stride, samples, channels, *lengths))
    first = [
        *(start % s for start, s in zip(starts, stride, strict=True)),
        *(a // s for a, s in zip(starts, stride, strict=True)),
    ]
    ends = [*(phase + 1 for phase in first[:rank]), *(a + r for a, r in zip(first[rank:], reached, strict=True))]
    axes = [*range(rank), *range(rank + 2, 2 * rank + 2)]
    part = emitter.node("Slice", source, emitter.integers(*first), emitter.integers(*ends), emitter.integers(*axes))
    return reshape(call, part, (samples, channels, *reached))


def _matrix_product(call: Call, tap: str) -> str:
    """``g x_tap^T`` over samples and places, for each group: [g, O/g, I/g]."""
    emitter = call.emitter
    groups = int(call.arguments["groups"])
    batch, outputs, *reached = call.shape("grad_output")
    inputs, places = call.shape("input")[1], math.prod(reached)
    gradient = reshape(call, call.value("grad_output"), (batch, groups, outputs // groups, places))
    source = reshape(call, tap, (batch, groups, inputs // groups, places))
    gradient = emitter.node("Transpose", gradient, perm=[1, 2, 0, 3])
    source = emitter.node("Transpose", source, perm=[1, 0, 3, 2])
    return emitter.node(
        "MatMul",
        reshape(call, gradient, (groups, outputs // groups, batch * places)),
        reshape(call, source, (groups, batch * places, inputs // groups)),
    )


def max_pool(call: Call) -> Names:
    """``aten::max_pool2d_with_indices``. ONNX counts its indices over the whole tensor, torch per channel;
    only the backward pass below reads them, and it knows."""
    arguments = call.arguments
    kernel = _pair(arguments["kernel_size"])
    padding = _pair(arguments["padding"])
    return call.emitter.nodes(
        "MaxPool",
        [call.value("self")],
        2,
        kernel_shape=kernel,
        strides=_pair(arguments["stride"]) if arguments["stride"] else kernel,
        pads=[*padding, *padding],
        dilations=_pair(arguments["dilation"]),
        ceil_mode=int(arguments["ceil_mode"]),
    )


def max_pool_backward(call: Call) -> Names:
    """``aten::max_pool2d_with_indices_backward``: add every gradient where its maximum was."""
    emitter = call.emitter
    shape = call.shape("self")
    empty = emitter.node("ConstantOfShape", emitter.integers(math.prod(shape)))
    spread = emitter.node(
        "ScatterElements",
        empty,
        reshape(call, call.value("indices"), (-1,)),
        reshape(call, call.value("grad_output"), (-1,)),
        axis=0,
        reduction="add",
    )
    return reshape(call, spread, shape)


def average_pool(call: Call) -> Names:
    """``aten::avg_pool2d`` without a divisor of its own."""
    arguments = call.arguments
    if arguments["divisor_override"] is not None:
        raise call.unsupported("an average pool with a divisor of its own is not written")
    kernel, padding = _pair(arguments["kernel_size"]), _pair(arguments["padding"])
    return call.emitter.node(
        "AveragePool",
        call.value("self"),
        kernel_shape=kernel,
        strides=_pair(arguments["stride"]) if arguments["stride"] else kernel,
        pads=[*padding, *padding],
        ceil_mode=int(arguments["ceil_mode"]),
        count_include_pad=int(arguments["count_include_pad"]),
    )


def average_pool_backward(call: Call) -> Names:
    """``aten::avg_pool2d_backward``: spread each gradient evenly over its window.

    A transposed depthwise convolution with a constant kernel; every window must count the same number of places.
    """
    emitter, arguments = call.emitter, call.arguments
    channels, *sizes = call.shape("self")[1:]
    kernel, padding = _pair(arguments["kernel_size"]), _pair(arguments["padding"])
    stride = _pair(arguments["stride"]) if arguments["stride"] else kernel
    reached = call.shape("grad_output")[2:]
    rest = [
        size - ((reach - 1) * s - 2 * p + k)
        for size, reach, s, p, k in zip(sizes, reached, stride, padding, kernel, strict=True)
    ]
    uneven = any(padding) and not arguments["count_include_pad"]
    if uneven or min(rest) < 0 or arguments["divisor_override"] is not None:
        raise call.unsupported("average pools whose windows count unequal numbers of places are not written")
    share = np.full((channels, 1, *kernel), 1.0 / math.prod(kernel), dtype=np.float32)
    return emitter.node(
        "ConvTranspose",
        call.value("grad_output"),
        emitter.constant(share),
        strides=stride,
        pads=[*padding, *padding],
        output_padding=rest,
        group=channels,
    )


def _pair(value: Sequence[int] | int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * 2 if len(given) == 1 else given
