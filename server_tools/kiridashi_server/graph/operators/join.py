"""Rules of operators that join tensors, take them apart, or pick from them."""

from __future__ import annotations

from kiridashi_server.graph.dims import (
    Dims,
    broadcast,
    concatenate,
    freeze,
    freeze_all,
    fresh,
    is_frozen,
    size_of,
    unify,
)
from kiridashi_server.graph.rules import Call, Result, rule

# --- joining and taking apart -----------------------------------------------------------------------------


@rule("cat", "concat")
def cat(call: Call) -> Result | None:
    """One dimension is a concatenation, the others are the same in all parts."""
    known = _parts(call)
    if known is None:
        return None
    axis = call.arguments["dim"] % len(known[0])
    return [
        concatenate([part[place] for part in known])
        if place == axis
        else broadcast([[part[place]] for part in known])[0]
        for place in range(len(known[0]))
    ]


@rule("stack")
def stack(call: Call) -> Result | None:
    """A new dimension counts the parts; the others are the same in all of them."""
    known = _parts(call)
    if known is None:
        return None
    axis = call.arguments["dim"] % (len(known[0]) + 1)
    same = broadcast(known)
    return [*same[:axis], fresh(len(known), "stacked"), *same[axis:]]


def _parts(call: Call) -> list[Dims] | None:
    parts = [call.dims_of(value) for value in call.arguments["tensors"]]
    known = [part for part in parts if part is not None]
    return known if known and len(known) == len(parts) and len({len(part) for part in known}) == 1 else None


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


@rule("glu")
def gated_half(call: Call) -> Result | None:
    """One half of a dimension, unit by unit, gates the other."""
    source = call.dims("self")
    if source is None:
        return None
    axis = call.arguments["dim"] % len(source)
    half = fresh(call.shape[axis])
    unify(concatenate([half, half]), source[axis])
    return [*source[:axis], half, *source[axis + 1 :]]


@rule("unbind")
def unbind(call: Call) -> Result | None:
    """One dimension is taken apart into its single indices."""
    source = call.dims("self")
    if source is None:
        return None
    axis = call.arguments["dim"] % len(source)
    freeze(source[axis], "taken apart")
    return tuple([*source[:axis], *source[axis + 1 :]] for _ in call.shapes)


@rule("getitem")
def getitem(call: Call) -> Result | None:
    """One result of an operator with several."""
    holder, index = call.node.args
    parts = call.parts_of(holder)
    return parts[index] if parts is not None and isinstance(index, int) else None


# --- picking ----------------------------------------------------------------------------------------------


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


@rule("index")
def index(call: Call) -> Result | None:
    """Whole dimensions are indexed by tensors: a table of relative positions, a window, a mask of fixed size."""
    source = call.dims("self")
    if source is None:
        return None
    wanted = list(call.arguments["indices"])
    wanted += [None] * (len(source) - len(wanted))
    places = [axis for axis, value in enumerate(wanted) if value is not None]
    tensors = [dims for axis in places if (dims := call.dims_of(wanted[axis])) is not None]
    if len(tensors) != len(places) or not places:
        return None
    freeze_all([source[axis] for axis in places], "indexed")
    for dims in tensors:
        freeze_all(dims, "index")
    new = broadcast(tensors)
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    kept = [dim for axis, dim in enumerate(source) if axis not in places]
    return [*kept[:first], *new, *kept[first:]]


@rule("index_select")
def index_select(call: Call) -> Result | None:
    """Indices of one dimension are taken."""
    source, chosen = call.dims("self"), call.dims("index")
    if source is None or chosen is None:
        return None
    axis = call.arguments["dim"] % len(source)
    freeze_all([source[axis], *chosen], "indexed")
    return [*source[:axis], fresh(call.shape[axis], "indexed"), *source[axis + 1 :]]


@rule("gather")
def gather(call: Call) -> Result | None:
    """Indices of one dimension are taken, others for each place of the other dimensions."""
    source, chosen = call.dims("self"), call.dims("index")
    if source is None or chosen is None or not len(source) == len(chosen) > 0:
        return None
    taken = call.arguments["dim"] % len(source)
    for axis, (dim, other) in enumerate(zip(source, chosen, strict=True)):
        if axis == taken or size_of(dim) != size_of(other):
            freeze_all([dim, other], "indexed")
        else:
            unify(dim, other)
    return chosen


# --- putting back, as writes in place become ---------------------------------------------------------------


@rule("select_scatter")
def put_index(call: Call) -> Result | None:
    """One index of a dimension is replaced."""
    source, part = call.dims("self"), call.dims("src")
    if source is None or part is None:
        return None
    axis = call.arguments["dim"] % len(source)
    freeze(source[axis], "indexed")
    return broadcast([source, [*part[:axis], source[axis], *part[axis:]]])


@rule("slice_scatter")
def put_range(call: Call) -> Result | None:
    """A range of a dimension is replaced; all of it may be."""
    source, part = call.dims("self"), call.dims("src")
    if source is None or part is None:
        return None
    axis = call.arguments["dim"] % len(source)
    if size_of(source[axis]) != size_of(part[axis]):
        freeze_all([source[axis], part[axis]], "sliced")
        part = [*part[:axis], source[axis], *part[axis + 1 :]]
    return broadcast([source, part])


@rule("index_put")
def put_masked(call: Call) -> Result | None:
    """Elements that a mask of the whole tensor names get one value."""
    source, values = call.dims("self"), call.dims("values")
    masks = [call.dims_of(value) for value in call.arguments["indices"]]
    if source is None or values != [] or len(masks) != 1 or masks[0] is None or len(masks[0]) != len(source):
        return None
    return broadcast([source, masks[0]])


@rule("embedding")
def embedding(call: Call) -> Result | None:
    """Rows of a table are taken; its columns are channels."""
    table, chosen = call.dims("weight"), call.dims("indices")
    if table is None or chosen is None:
        return None
    freeze(table[0], "indexed")
    call.produces("weight", "node", axis=1)
    return [*chosen, table[1]]


@rule("roll", "flip")
def reorder(call: Call) -> Result | None:
    """Some dimensions change the order of their indices; all of them when none is named."""
    source = call.dims("self")
    if source is None:
        return None
    axes = call.arguments["dims"] or range(len(source))
    freeze_all([source[axis] for axis in axes], "reordered")
    return source


@rule("topk", "sort", "max", "min")
def pick_along(call: Call) -> Result | None:
    """Values and indices are picked along one dimension, whose indices must stay comparable."""
    source = call.dims("self")
    if source is None or "dim" not in call.arguments:
        return None
    axis = call.arguments["dim"] % len(source)
    freeze(source[axis], f"picked ({call.name})")
    return tuple(_picked(source, axis, shape) for shape in call.shapes)


def _picked(source: Dims, axis: int, shape: tuple[int, ...]) -> Dims:
    if len(shape) < len(source):
        return [*source[:axis], *source[axis + 1 :]]
    return [*source[:axis], fresh(shape[axis], "picked"), *source[axis + 1 :]]
