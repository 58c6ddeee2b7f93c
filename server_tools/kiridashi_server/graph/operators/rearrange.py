"""Rules of operators that rearrange: other shapes, other orders, repetition."""

from __future__ import annotations

from collections.abc import Sequence

from kiridashi_server.graph.dims import ONE, broadcast, freeze, fresh, regroup, size_of, unify
from kiridashi_server.graph.rules import Call, Result, rule


@rule("view", "reshape", "_unsafe_view")
def reshape(call: Call) -> Result | None:
    """Row-major regrouping of factors; the sizes asked for are rewritten by a cut."""
    source = call.dims("self")
    argument = "size" if "size" in call.arguments else "shape"
    if source is None or argument not in call.arguments:
        return None
    result = regroup(source, call.shape)
    if result is not None:
        call.resizes_items(argument, result)
    return result


@rule("flatten")
def flatten(call: Call) -> Result | None:
    """Row-major regrouping without sizes."""
    source = call.dims("self")
    return None if source is None else regroup(source, call.shape)


@rule("unflatten")
def unflatten(call: Call) -> Result | None:
    """Row-major splitting of one dimension."""
    source = call.dims("self")
    result = None if source is None else regroup(source, call.shape)
    if source is None or result is None:
        return None
    first = call.arguments["dim"] % len(source)
    call.resizes_items("sizes", result[first : first + len(call.arguments["sizes"])])
    return result


@rule("view_as", "reshape_as")
def reshape_as(call: Call) -> Result | None:
    """Row-major regrouping to the shape of another tensor."""
    source, other = call.dims("self"), call.dims("other")
    result = None if source is None or other is None else regroup(source, call.shape)
    for dim, like in zip(result or [], other or [], strict=False):
        unify(dim, like)
    return result


@rule("permute")
def permute(call: Call) -> Result | None:
    """Dimensions in another order."""
    source = call.dims("self")
    return None if source is None else [source[axis] for axis in call.arguments["dims"]]


@rule("movedim")
def move(call: Call) -> Result | None:
    """Some dimensions move to other places, the rest keep their order."""
    source = call.dims("self")
    if source is None:
        return None
    origins, targets = (
        [axis % len(source) for axis in (value if isinstance(value, Sequence) else [value])]
        for value in (call.arguments["source"], call.arguments["destination"])
    )
    rest = iter(axis for axis in range(len(source)) if axis not in origins)
    moved = dict(zip(targets, origins, strict=True))
    return [source[moved[place] if place in moved else next(rest)] for place in range(len(source))]


@rule("transpose")
def transpose(call: Call) -> Result | None:
    """Two dimensions change places."""
    source = call.dims("self")
    if source is None:
        return None
    result, first, second = list(source), call.arguments["dim0"], call.arguments["dim1"]
    result[first], result[second] = source[second], source[first]
    return result


@rule("t", "numpy_T")
def reverse(call: Call) -> Result | None:
    """Dimensions in reverse order."""
    source = call.dims("self")
    return None if source is None else source[::-1]


@rule("unsqueeze")
def unsqueeze(call: Call) -> Result | None:
    """A new dimension of size one."""
    source = call.dims("self")
    if source is None:
        return None
    place = call.arguments["dim"] % (len(source) + 1)
    return [*source[:place], ONE, *source[place:]]


@rule("squeeze")
def squeeze(call: Call) -> Result | None:
    """Dimensions of size one disappear: those named, or all."""
    source = call.dims("self")
    if source is None:
        return None
    named = call.arguments.get("dim", range(len(source)))
    axes = {axis % len(source) for axis in (named if isinstance(named, Sequence) else [named])}
    return [dim for axis, dim in enumerate(source) if axis not in axes or size_of(dim) != 1]


@rule("expand")
def expand(call: Call) -> Result | None:
    """Dimensions of size one are repeated, and new ones may stand in front."""
    source = call.dims("self")
    if source is None:
        return None
    aligned = [ONE] * (len(call.shape) - len(source)) + source
    result = [dim if size_of(dim) == size else fresh(size) for dim, size in zip(aligned, call.shape, strict=True)]
    call.resizes_items("size", result)
    return result


@rule("expand_as")
def expand_as(call: Call) -> Result | None:
    """Dimensions of size one are repeated as another tensor has them."""
    source, other = call.dims("self"), call.dims("other")
    return None if source is None or other is None else broadcast([source, other])


@rule("repeat", "tile")
def repeat(call: Call) -> Result | None:
    """Dimensions are repeated as a whole: (copy, index)."""
    source = call.dims("self")
    argument = "repeats" if call.name == "repeat" else "dims"
    if source is None:
        return None
    aligned = [ONE] * (len(call.shape) - len(source)) + source
    copies = [fresh(size // size_of(dim)) for size, dim in zip(call.shape, aligned, strict=True)]
    named = len(call.arguments[argument])
    call.resizes_items(argument, copies[len(copies) - named :])  # of a tiling only the last may be named
    return [copy + dim for copy, dim in zip(copies, aligned, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Result | None:
    """Each index of one dimension is repeated: (index, copy)."""
    source, times = call.dims("self"), call.arguments["repeats"]
    if source is None or not isinstance(times, int) or call.arguments["dim"] is None:
        return None
    axis = call.arguments["dim"] % len(source)
    copies = fresh(times)
    if call.arguments["output_size"] is None:
        call.resizes("repeats", copies)
    else:
        freeze(source[axis] + copies, "repeated to a fixed size")
    return [*source[:axis], source[axis] + copies, *source[axis + 1 :]]


@rule("channel_shuffle")
def channel_shuffle(call: Call) -> Result | None:
    """Channels (group, channel of the group) become (channel of the group, group)."""
    source, groups = call.dims("self"), call.arguments["groups"]
    if source is None or not isinstance(groups, int):
        return None
    group, inner = fresh(groups), fresh(size_of(source[1]) // groups)
    unify(source[1], group + inner)
    call.resizes("groups", group)
    return [source[0], inner + group, *source[2:]]


@rule("sym_size")
def read_size(call: Call) -> Result | None:
    """The graph computes with the size of a dimension; only a batch that is never cut may be read so."""
    source = call.dims("self")
    if source is not None:
        freeze(source[call.arguments["dim"]], "its size is read by the graph")
    return []
