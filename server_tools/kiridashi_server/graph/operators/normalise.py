"""Rules of normalisations."""

from __future__ import annotations

from kiridashi_server.graph.dims import Dim, broadcast, freeze, freeze_all, fresh, is_frozen, size_of, unify
from kiridashi_server.graph.rules import Call, Result, passed_on, rule


@rule("batch_norm")
def batch_norm(call: Call) -> Result | None:
    """Every channel is normalised by itself: by running statistics, or over the batch and all positions.

    The latter is also how weights are standardised; there, positions are channels.
    """
    source = call.dims("input")
    if source is None or len(source) < 2:
        return None
    if call.dims("running_mean") is None:
        freeze_all([source[0], *source[3:]], "batch normalisation")
        if not call.normalised:
            freeze_all(source[2:], "batch normalisation")
        for dim in source[2:3]:
            if not is_frozen(dim):
                call.normalises(dim)
    _unify_vectors(call, source[1])
    return source


@rule("instance_norm")
def instance_norm(call: Call) -> Result | None:
    """Every channel is normalised by itself, over all its positions."""
    source = call.dims("input")
    if source is None or len(source) < 3:
        return None
    freeze_all(source[2:], "instance normalisation")
    _unify_vectors(call, source[1])
    return source


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Result | None:
    """The last dimensions are normalised together: none of their units can go without changing the rest."""
    source = call.dims("input")
    if source is None:
        return None
    normalised = source[-len(call.arguments["normalized_shape"]) :]
    if not call.normalised or len(normalised) > 1:
        freeze_all(normalised, "layer normalisation")
    for name in ("weight", "bias"):
        for dim, other in zip(call.dims(name) or [], normalised, strict=False):
            unify(dim, other)
    if not is_frozen(normalised[-1]):
        call.resizes_items("normalized_shape", normalised)
        call.normalises(normalised[-1])
    return source


@rule("group_norm")
def group_norm(call: Call) -> Result | None:
    """Channels are (group, channel of the group): whole groups can go, those of one are normalised together."""
    source, groups = call.dims("input"), call.arguments["num_groups"]
    if source is None or len(source) < 2:
        return None
    freeze_all(source[2:], "group normalisation")
    group, inner = fresh(groups), fresh(size_of(source[1]) // groups)
    if not call.normalised:
        freeze(inner, "group normalisation")
    unify(source[1], group + inner)
    _unify_vectors(call, source[1])
    call.resizes("num_groups", group)
    if not is_frozen(inner):
        call.normalises(passed_on(group) + inner)
    return source


@rule("_weight_norm")
def weight_norm(call: Call) -> Result | None:
    """Each index of one dimension of a weight is normalised by itself, over all others."""
    weight, scale = call.dims("v"), call.dims("g")
    if weight is None or scale is None:
        return None
    kept = call.arguments["dim"] % len(weight) if call.arguments["dim"] != -1 else None
    freeze_all([dim for axis, dim in enumerate(weight) if axis != kept], "weight normalisation")
    return broadcast([weight, scale])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(call: Call) -> Result | None:
    """One dimension is normalised over."""
    source = call.dims("self")
    if source is None:
        return None
    freeze(source[call.arguments["dim"]], "softmax")
    return source


def _unify_vectors(call: Call, channels: Dim) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = call.dims(name)
        if vector is not None:
            unify(vector[0], channels)
