"""Rules of operators that sum over channels: convolutions, linear layers, products and attention."""

from __future__ import annotations

from kiridashi_server.graph.dims import ONE, Dim, Dims, broadcast, freeze, freeze_all, fresh, is_frozen, size_of, unify
from kiridashi_server.graph.rules import Call, Result, WorkKind, passed_on, rule

KERNEL = "kernel size"


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Result | None:
    """Each group of channels reads the input channels of that group; as a whole, groups are passed on.

    Channels are (group, channel of the group): units are whole groups, and channels cut evenly in every group.
    With one group there is only the latter, in a depthwise convolution only the former.
    """
    source, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    groups = call.arguments["groups"]
    if source is None or weight is None or len(source) != len(weight) or not isinstance(groups, int):
        return None
    freeze_all(source[2:], "convolved over")
    freeze_all(weight[2:], KERNEL)
    group, outputs = fresh(groups), fresh(size_of(weight[0]) // groups)
    unify(source[1], group + weight[1])
    unify(weight[0], group + outputs)
    if size_of(weight[1]) > 1:
        call.reads("input", 1 - len(source), passed_on(group) + weight[1])
    if size_of(outputs) > 1 or groups == 1:
        call.produces("weight", "filter")
    if groups > 1:
        call.resizes("groups", group)
    if bias is not None:
        unify(bias[0], weight[0])
    result = [source[0], weight[0], *(fresh(size, "position") for size in call.shape[2:])]
    kind: WorkKind = "depthwise" if groups > 1 and size_of(weight[1]) == 1 else "dense"
    call.works(kind, [result[0], *result[2:]], weight[1], weight[0], kernel=weight[2:])
    return result


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Result | None:
    """As a convolution, the weight's first two axes exchanged: inputs of all groups, outputs of one."""
    source, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    groups = call.arguments["groups"]
    if source is None or weight is None or len(source) != len(weight) or not isinstance(groups, int):
        return None
    freeze_all(source[2:], "convolved over")
    freeze_all(weight[2:], KERNEL)
    group, inputs = fresh(groups), fresh(size_of(weight[0]) // groups)
    unify(weight[0], group + inputs)
    unify(source[1], weight[0])
    outputs = group + weight[1]
    if size_of(inputs) > 1:
        call.reads("input", 1 - len(source), passed_on(group) + inputs)
    if size_of(weight[1]) > 1:
        call.produces("weight", "filter", axis=1)
    if groups > 1:
        call.resizes("groups", group)
    if bias is not None:
        unify(bias[0], outputs)
    call.works("dense", [source[0], *source[2:]], source[1], weight[1], kernel=weight[2:])
    return [source[0], outputs, *(fresh(size, "position") for size in call.shape[2:])]


@rule("linear")
def linear(call: Call) -> Result | None:
    """The operator reads the last dimension."""
    source, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    if source is None or weight is None:
        return None
    unify(source[-1], weight[-1])
    call.reads("input", -1, source[-1])
    call.works("dense", source[:-1], weight[-1], weight[0] if len(weight) == 2 else ONE)
    if len(weight) == 1:  # one output, without an axis
        return source[:-1]
    if bias is not None:
        unify(bias[0], weight[0])
    call.produces("weight", "node")
    return [*source[:-1], weight[0]]


@rule("matmul", "bmm", "mm", "mv")
def product(call: Call) -> Result | None:
    """The operator reads the inner dimension; leading ones are passed on."""
    other = next(name for name in ("other", "mat2", "vec") if name in call.arguments)
    return _product(call, "self", other)


@rule("addmm", "baddbmm")
def product_and_sum(call: Call) -> Result | None:
    """A product, to which the first argument is added."""
    left, right = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
    result, added = _product(call, left, right), call.dims("self")
    return None if result is None or added is None else broadcast([result, added])


def _product(call: Call, first: str, second: str) -> Dims | None:
    left, right = call.dims(first), call.dims(second)
    if left is None or right is None or len(left) < 2:
        return None
    kind: WorkKind = "dense" if call.is_parameter(second) else "product"
    if len(right) == 1:
        unify(left[-1], right[0])
        call.reads(first, -1, left[-1])
        call.works(kind, left[:-1], left[-1])
        return left[:-1]
    unify(left[-1], right[-2])
    call.reads(first, -1, left[-1])
    if len(right) == 2:
        call.produces(second, "node", axis=1)
    leading = broadcast([left[:-2], right[:-2]])
    call.has_heads(leading)
    call.works(kind, [*leading, left[-2]], left[-1], right[-1])
    return [*leading, left[-2], right[-1]]


def _spelled(term: str, rank: int) -> str:
    """A term of an equation with digits, counted from the right, in place of the dots."""
    return term.replace("...", "".join(str(place) for place in reversed(range(rank - len(term) + 3))))


@rule("einsum")
def einsum(call: Call) -> Result | None:
    """Equal letters are the same dimension; letters that the result has not are read.

    Not understood, and so frozen: a letter twice in one operand (a diagonal), and an equation without a result.
    """
    operands = [call.dims_of(value) for value in call.arguments["tensors"]]
    terms, arrow, output = call.arguments["equation"].replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or len(letters) != len(operands) or None in operands:
        return None
    letters = [_spelled(term, len(dims or [])) for term, dims in zip(letters, operands, strict=True)]
    output = _spelled(output, len(call.shape))
    found: dict[str, Dim] = {}
    for term, dims in zip(letters, operands, strict=True):
        if dims is None or len(dims) != len(term) or len(set(term)) != len(term):
            return None
        for letter, dim in zip(term, dims, strict=True):
            found[letter] = broadcast([[found.get(letter, ONE)], [dim]])[0]
    for letter, dim in found.items():
        if letter not in output:
            place = next(place for place, term in enumerate(letters) if letter in term)
            call.reads("tensors", letters[place].index(letter) - len(letters[place]), dim, place)
    if len(letters) > 1:
        call.has_heads([dim for letter, dim in found.items() if letter in output and all(letter in t for t in letters)])
    call.works("product", found.values())
    return [found[letter] for letter in output]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Result | None:
    """Heads and value channels are passed on; where the query's size sets the scale, it must stay.

    With grouped queries a head of keys and values serves several heads of queries.
    """
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    if query is None or key is None or value is None or not len(query) == len(key) == len(value) >= 3:
        return None
    if call.arguments.get("enable_gqa"):
        if size_of(query[-3]) % size_of(key[-3]):
            return None
        unify(key[-3], value[-3])
        unify(query[-3], key[-3] + fresh(size_of(query[-3]) // size_of(key[-3])))
        leading = [*broadcast([query[:-3], key[:-3], value[:-3]]), query[-3]]
    else:
        leading = broadcast([query[:-2], key[:-2], value[:-2]])
    unify(query[-1], key[-1])
    if call.arguments.get("scale") is None:
        freeze(query[-1], "its size sets the scale of attention")
    elif not is_frozen(query[-1]):
        call.reads("query", -1, query[-1])
    unify(key[-2], value[-2])
    freeze(key[-2], "attended over")
    if call.arguments["is_causal"]:
        freeze(query[-2], "its order matters")
    mask = call.dims("attn_mask")
    if mask is not None:
        broadcast([[*leading, query[-2], key[-2]], mask])
    call.has_heads(leading)
    call.works("product", [*leading, query[-2]], query[-1], key[-2])
    call.works("product", [*leading, query[-2]], key[-2], value[-1])
    return [*leading, query[-2], value[-1]]
