"""The train step in several sizes, all reading their frozen weights from one inference file.

A graph that held its frozen weights would be nearly as large as the model, three times over. ONNX lets a weight lie
in any file beside the graph: here in the float32 inference file, at the places that the manifest lists for patching.
The runtime maps them into memory, and optimises as if they were inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiridashi.artifacts import describe_file, write_atomic
from kiridashi.errors import InputError
from kiridashi.manifest import Artifact, Patch, TrainVariant, VariantName
from onnx import TensorProto, helper

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.bundle import BundleFile
from kiridashi_server.export.onnx import canonical_bytes
from kiridashi_server.export.train_step import build_train_step
from kiridashi_server.export.train_step_cost import step_cost
from kiridashi_server.export.train_step_parameters import variant_parameters
from kiridashi_server.export.train_step_parity import StepParity
from kiridashi_server.export.train_step_trace import StepSettings

RATE_FACTORS: Mapping[VariantName, float] = {"biases": 1.0, "last-blocks": 0.4, "all": 2.0}
"""Each variant's share of the learning rate, found on two of the shipped tasks; gradients are clipped to one norm."""
_WORTH_SHARING = 64
"""Weights of fewer elements stay inside a graph."""


@dataclass(frozen=True)
class Variant:
    """One exported variant: its manifest entry, its file, and how far it is from torch."""

    entry: TrainVariant
    file: BundleFile
    parity: StepParity


def export_variants(
    model: Classifier,
    settings: StepSettings,
    names: Sequence[VariantName],
    learning_rate: float,
    weights: Artifact,
    folder: Path,
) -> tuple[Variant, ...]:
    """Write a train-step graph for each of ``names``, smallest first, after checking each against torch.

    Args:
        model: the classifier, batch normalisation folded, float32.
        settings: of every graph, but for the parameters.
        names: which variants.
        learning_rate: of ``biases``; the others have theirs in proportion (``RATE_FACTORS``).
        weights: the float32 ONNX file, which lies in ``folder``; a variant trains no parameter that has no place in it.
        folder: gets ``train-step-<name>.onnx``.

    Raises:
        InputError: no variant, or one twice.
        ExportError: as :func:`~kiridashi_server.export.train_step.export_train_step`.
    """
    if not names or len(set(names)) != len(names) or not set(names) <= set(RATE_FACTORS):
        raise InputError(f"cannot export the variants {list(names)}", why=f"choose some of {', '.join(RATE_FACTORS)}")
    places = {patch.parameter: patch for patch in weights.patches}
    data = (folder / weights.name).read_bytes()
    made = []
    for name in (one for one in RATE_FACTORS if one in names):
        parameters = tuple(one for one in variant_parameters(model, name) if one in places)
        chosen = StepSettings(settings.example_shape, parameters, settings.batch, settings.clip_norm, settings.momentum)
        proto, parity = build_train_step(model, chosen)
        cost = step_cost(proto)
        share_weights(proto, weights.name, data, places)
        path = folder / f"train-step-{name}.onnx"
        write_atomic(path, canonical_bytes(proto))
        rate = learning_rate * RATE_FACTORS[name]
        entry = TrainVariant(name, path.name, parameters, rate, cost.peak_bytes, cost.macs, cost.moved_bytes)
        made.append(Variant(entry, BundleFile(path, describe_file(path, "train-step")), parity))
    return tuple(made)


def share_weights(proto: Any, location: str, data: bytes, places: Mapping[str, Patch]) -> None:
    """Replace the weights inside ``proto`` by references to equal bytes of another file, in place.

    Args:
        proto: an ONNX model with named weights.
        location: the other file's name; it will lie beside the graph.
        data: its bytes.
        places: where weights lie in it, by name. What has no place, or other bytes there, stays inside.
    """
    turns, kept = [], []
    for tensor in proto.graph.initializer:
        patch = places.get(tensor.name)
        size = 4 * math.prod(tensor.dims)
        if patch is None or size < 4 * _WORTH_SHARING or tensor.data_type != TensorProto.FLOAT:
            kept.append(tensor)
            continue
        stored = _stored(tensor, patch)
        if data[patch.offset : patch.offset + size] != stored:
            kept.append(tensor)
            continue
        name = tensor.name
        in_order = patch.order == tuple(range(len(patch.shape)))
        if not in_order:
            name = f"stored.{tensor.name}"
            back = [patch.order.index(axis) for axis in range(len(patch.order))]
            turns.append(helper.make_node("Transpose", [name], [tensor.name], name=f"turn.{tensor.name}", perm=back))
        shape = [patch.shape[axis] for axis in patch.order]
        kept.append(_reference(name, shape, {"location": location, "offset": patch.offset, "length": size}))
    nodes = [*turns, *proto.graph.node]
    for field, values in (("initializer", kept), ("node", nodes)):
        proto.graph.ClearField(field)
        getattr(proto.graph, field).extend(values)


def _stored(tensor: Any, patch: Patch) -> bytes:
    from onnx import numpy_helper

    value = numpy_helper.to_array(tensor)
    stored: bytes = value.transpose(patch.order).astype("<f4").tobytes() if value.shape == tuple(patch.shape) else b""
    return stored


def _reference(name: str, shape: Sequence[int], where: Mapping[str, str | int]) -> Any:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in where.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor
