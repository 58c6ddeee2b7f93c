"""Operators that move values without computing any, and their gradients, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kiridashi_server.export.train_step_emitter import Call, Names


def reshape(call: Call, value: str, shape: Sequence[int]) -> str:
    """``value`` in another shape."""
    return call.emitter.reshaped(value, shape)


def reshaped(call: Call) -> Names:
    """view, squeeze, unsqueeze: the same values in the result's shape."""
    if call.shape("self") == call.result_shape:
        return call.value("self")
    return reshape(call, call.value("self"), call.result_shape)


def expanded(call: Call) -> Names:
    """``aten::expand``: axes of size one repeated."""
    if call.shape("self") == call.result_shape:
        return call.value("self")
    return call.emitter.node("Expand", call.value("self"), call.emitter.integers(*call.result_shape))


def permuted(call: Call) -> Names:
    """``aten::permute``."""
    rank = len(call.result_shape)
    order = [axis % rank for axis in call.arguments["dims"]]
    return call.emitter.node("Transpose", call.value("self"), perm=order)


def transposed(call: Call) -> Names:
    """``aten::transpose`` and ``aten::t``: two axes swapped."""
    order = list(range(len(call.result_shape)))
    first, second = (call.arguments.get(name, axis) for axis, name in enumerate(("dim0", "dim1")))
    order[first], order[second] = order[second], order[first]
    return call.emitter.node("Transpose", call.value("self"), perm=order)


def concatenated(call: Call) -> Names:
    """``aten::cat``."""
    parts = [call.named(node) for node in call.arguments["tensors"]]
    return call.emitter.node("Concat", *parts, axis=call.arguments["dim"])


def split(call: Call) -> Names:
    """``aten::split_with_sizes``: a name for each part."""
    sizes = call.arguments["split_sizes"]
    return call.emitter.nodes(
        "Split",
        [call.value("self"), call.emitter.integers(*sizes)],
        len(sizes),
        axis=call.arguments["dim"],
    )


def sliced(call: Call) -> Names:
    """``aten::slice``; torch clamps an end behind the last element."""
    size = call.shape("self")[call.arguments["dim"]]
    start, end = call.arguments["start"] or 0, call.arguments["end"]
    bounds = (start, size if end is None else min(end, size), call.arguments["dim"], call.arguments["step"])
    first, last, axis, step = (call.emitter.integers(bound) for bound in bounds)
    return call.emitter.node("Slice", call.value("self"), first, last, axis, step)


def selected(call: Call) -> Names:
    """``aten::select``: one index of an axis, the axis gone."""
    index = call.emitter.constant(np.asarray(call.arguments["index"], dtype=np.int64))
    return call.emitter.node("Gather", call.value("self"), index, axis=call.arguments["dim"])


def padded(call: Call) -> Names:
    """aten lists (before, after) from the last axis on; ONNX all before, then all after. Negative ones crop."""
    given = list(call.arguments["pad"])
    rank = len(call.result_shape)
    before, after = [0] * rank, [0] * rank
    for position in range(len(given) // 2):
        axis = rank - 1 - position
        before[axis], after[axis] = given[2 * position], given[2 * position + 1]
    value = call.number(call.arguments["value"]) if call.arguments["value"] else ""
    pads = call.emitter.integers(*before, *after)
    return call.emitter.node("Pad", call.value("self"), pads, *([value] if value else []))


def slice_backward(call: Call) -> Names:
    """The gradient of a slice: zeros around it."""
    if call.arguments["step"] != 1:
        raise call.unsupported("gradients of slices with a step are not written")
    start, length = call.arguments["start"], call.shape("grad_output")[call.arguments["dim"]]
    return _surrounded(call, call.value("grad_output"), start, length)


def select_backward(call: Call) -> Names:
    """The gradient of one index along an axis: zeros around it."""
    thin = list(call.result_shape)
    thin[call.arguments["dim"]] = 1
    return _surrounded(call, reshape(call, call.value("grad_output"), thin), call.arguments["index"], 1)


def _surrounded(call: Call, part: str, start: int, length: int) -> str:
    """``part``, which fills ``length`` indices from ``start`` on of its axis, between zeros."""
    sizes, axis = call.result_shape, call.arguments["dim"]
    start = start % sizes[axis]
    before, after = [0] * len(sizes), [0] * len(sizes)
    before[axis], after[axis] = start, sizes[axis] - start - length
    return call.emitter.node("Pad", part, call.emitter.integers(*before, *after))
