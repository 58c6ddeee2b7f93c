"""Which parameters of a classifier the device trains, chosen from its graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kiridashi.errors import InputError
from kiridashi.manifest import VariantName
from torch import fx

from kiridashi_server.classifier import Classifier
from kiridashi_server.graph.program import arguments, operator_name

HEAD_PARAMETERS = ("head.weight", "head.bias")
"""The head's weight [classes, D] and bias [classes], as ``Classifier`` names them."""

_LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_LAST_QUARTER = 0.25


def bias_head_parameters(model: Classifier, share: float = _LAST_QUARTER) -> tuple[str, ...]:
    """The biases of the last convolutions and linear layers, then the head's weight and bias.

    Args:
        model: the classifier, batch normalisation folded (so that convolutions have biases); left as it is.
        share: how many of the feature extractor's convolutions and linear layers count as the last ones, as a
            share of their number, rounded up; layers are counted in the order in which they run. A quarter
            of EfficientNet-Lite0 is its last four blocks and the convolution behind them. 0 gives the head alone.

    Returns:
        Names out of ``model.named_parameters()``, in the order in which the layers run.

    Raises:
        InputError: ``share`` is not between 0 and 1.
    """
    last = _last_layers(model, share)
    known = {name for name, _ in model.named_parameters()}
    biases = [f"features.{bias.target}" for bias in map(_bias_of, last) if bias is not None]
    return (*(name for name in dict.fromkeys(biases) if name in known), *HEAD_PARAMETERS)


def last_parameters(model: Classifier, share: float = _LAST_QUARTER) -> tuple[str, ...]:
    """All parameters of the last layers, normalisations between them included, then the head's.

    Arguments, names and errors as :func:`bias_head_parameters`.
    """
    last = _last_layers(model, share)
    known = {name for name, _ in model.named_parameters()}
    nodes = list(model.features.graph.nodes)
    behind = nodes[nodes.index(last[0]) :] if last else []
    read = (
        f"features.{source.target}" for node in behind for source in node.all_input_nodes if source.op == "get_attr"
    )
    before = {source for node in nodes[: len(nodes) - len(behind)] for source in node.all_input_nodes}
    shared = {f"features.{source.target}" for source in before if source.op == "get_attr"}
    return (*(name for name in dict.fromkeys(read) if name in known and name not in shared), *HEAD_PARAMETERS)


def variant_parameters(model: Classifier, variant: VariantName) -> tuple[str, ...]:
    """What a variant of the train step trains, in the order of the model's parameters or of its layers."""
    if variant == "all":
        return tuple(name for name, _ in model.named_parameters())
    return last_parameters(model) if variant == "last-blocks" else bias_head_parameters(model)


def _last_layers(model: Classifier, share: float) -> list[fx.Node]:
    if not 0.0 <= share <= 1.0:
        raise InputError(
            f"the share of layers to train is {share}",
            why="it counts layers from the last one, from 0 (none) to 1 (all)",
        )
    layers = [node for node in model.features.graph.nodes if operator_name(node) in _LAYERS]
    return layers[len(layers) - math.ceil(share * len(layers)) :]


def _read_by(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """The parameters and buffers that these nodes read, by the classifier's names, in order."""
    sources = (source for node in nodes for source in node.all_input_nodes if source.op == "get_attr")
    return tuple(dict.fromkeys(f"features.{source.target}" for source in sources))


def _bias_of(layer: fx.Node) -> fx.Node | None:
    bias = arguments(layer)["bias"]
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
