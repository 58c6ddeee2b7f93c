"""Rules of operators that rearrange: other shapes and orders, joining and taking apart."""

from __future__ import annotations

from collections.abc import Sequence

from kiridashi_server.graph.dims import (
    ONE,
    broadcast,
    concatenate,
    freeze,
    fresh,
    is_frozen,
    regroup,
    size_of,
    unify,
)
from kiridashi_server.graph.rules import Call, Result, rule

# --- shape ------------------------------------------------------------------------------------------------


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
    result = [
        dim if size_of(dim) == size else fresh(size, "repeated") for dim, size in zip(aligned, call.shape, strict=True)
    ]
    call.resizes_items("size", result)
    return result


@rule("expand_as")
def expand_as(call: Call) -> Result | None:
    """Dimensions of size one are repeated as another tensor has them."""
    source, other = call.dims("self"), call.dims("other")
    return None if source is None or other is None else broadcast([source, other])


# --- joining and taking apart -----------------------------------------------------------------------------


@rule("cat", "concat")
def cat(call: Call) -> Result | None:
    """One dimension is a concatenation, the others are the same in all parts."""
    parts = [call.dims_of(value) for value in call.arguments["tensors"]]
    known = [part for part in parts if part is not None]
    if not known or len(known) != len(parts) or len({len(part) for part in known}) != 1:
        return None
    axis = call.arguments["dim"] % len(known[0])
    return [
        concatenate([part[place] for part in known])
        if place == axis
        else broadcast([[part[place]] for part in known])[0]
        for place in range(len(known[0]))
    ]


@rule("split_with_sizes")
def split(call: Call) -> Result | None:
    """One dimension is taken apart into pieces, whose sizes a cut rewrites."""
    source = call.dims("self")
    if source is None:
        return None
    axis = call.arguments["dim"] % len(source)
    sizes = [shape[axis] for shape in call.shapes]
    if is_frozen(source[axis]):
        pieces = [fresh(size, "part of a frozen dimension") for size in sizes]
    else:
        pieces = [fresh(size) for size in sizes]
        unify(concatenate(pieces), source[axis])
        call.resizes_items("split_sizes", pieces)
    return tuple([*source[:axis], piece, *source[axis + 1 :]] for piece in pieces)


@rule("unbind")
def unbind(call: Call) -> Result | None:
    """One dimension is taken apart into its single indices."""
    source = call.dims("self")
    if source is None:
        return None
    axis = call.arguments["dim"] % len(source)
    freeze(source[axis], "taken apart")
    return tuple([*source[:axis], *source[axis + 1 :]] for _ in call.shapes)


@rule("select")
def select(call: Call) -> Result | None:
    """One index of a dimension is taken."""
    source = call.dims("self")
    if source is None:
        return None
    axis = call.arguments["dim"] % len(source)
    freeze(source[axis], "indexed")
    return [*source[:axis], *source[axis + 1 :]]


@rule("slice")
def take_range(call: Call) -> Result | None:
    """A range of a dimension is taken; a range that is everything changes nothing."""
    source = call.dims("self")
    if source is None:
        return None
    axis = call.arguments["dim"] % len(source)
    if call.shape[axis] == size_of(source[axis]):
        return source
    freeze(source[axis], "sliced")
    return [*source[:axis], fresh(call.shape[axis], "sliced"), *source[axis + 1 :]]


@rule("getitem")
def getitem(call: Call) -> Result | None:
    """One result of an operator with several."""
    holder, index = call.node.args
    parts = call.parts_of(holder)
    return parts[index] if parts is not None and isinstance(index, int) else None


@rule("sym_size")
def read_size(call: Call) -> Result | None:
    """The graph computes with the size of a dimension; only a batch that is never cut may be read so."""
    source = call.dims("self")
    if source is not None:
        freeze(source[call.arguments["dim"]], "its size is read by the graph")
    return []
