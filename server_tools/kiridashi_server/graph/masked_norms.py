"""Normalisations whose statistics are weighted means over channels, as the masked dense program needs them.

With weights of one they are the plain normalisations; a channel of weight zero is not there: neither its values
nor its place count, as in the program that is cut. Weights may be anything that does not sum to zero or less.

Each function takes the weights and the arguments of the operator it stands for, by the names of its schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-30


def layer_norm(gate: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Layer normalisation over the last axis of ``input`` with weights ``gate`` [channels]."""
    values, share = given["input"], gate / gate.sum().clamp_min(_TINY)
    centred = values - (values * share).sum(-1, keepdim=True)
    result = centred * torch.rsqrt((centred.square() * share).sum(-1, keepdim=True) + given["eps"])
    return _affine(result, given["weight"], given["bias"])


def rms_norm(gate: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Root-mean-square normalisation over the last axis of ``input`` with weights ``gate`` [channels]."""
    values, share = given["input"], gate / gate.sum().clamp_min(_TINY)
    eps = torch.finfo(values.dtype).eps if given["eps"] is None else given["eps"]
    return _affine(values * torch.rsqrt((values.square() * share).sum(-1, keepdim=True) + eps), given["weight"], None)


def group_norm(gate: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Group normalisation of ``input`` [N, channels, ...] with weights ``gate`` [channels], by their group's sum."""
    values, groups = given["input"], given["num_groups"]
    shares = gate.reshape(groups, -1)
    shares = (shares / shares.sum(1, keepdim=True).clamp_min(_TINY))[None, :, :, None]
    grouped = values.reshape(values.shape[0], groups, values.shape[1] // groups, -1)
    centred = grouped - (grouped * shares).sum(2, keepdim=True).mean(3, keepdim=True)
    variance = (centred.square() * shares).sum(2, keepdim=True).mean(3, keepdim=True)
    result = (centred * torch.rsqrt(variance + given["eps"])).reshape(values.shape)
    return _affine(result, *_along_channels(values, given["weight"], given["bias"]))


def batch_norm(gate: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Batch normalisation of ``input`` [N, channels, L, ...] by its own statistics, with weights ``gate`` [L]."""
    values = given["input"]
    share = (gate / gate.sum().clamp_min(_TINY)).reshape(-1, *[1] * (values.dim() - 3))
    others = [0, *range(3, values.dim())]
    centred = values - (values * share).sum(2, keepdim=True).mean(others, keepdim=True)
    variance = (centred.square() * share).sum(2, keepdim=True).mean(others, keepdim=True)
    result = centred * torch.rsqrt(variance + given["eps"])
    return _affine(result, *_along_channels(values, given["weight"], given["bias"]))


def _along_channels(values: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors [channels] in a shape that broadcasts over ``values`` [N, channels, ...]."""
    shape = [-1, *[1] * (values.dim() - 2)]
    return [None if vector is None else vector.reshape(shape) for vector in vectors]


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = values if weight is None else values * weight
    return scaled if bias is None else scaled + bias


MASKED_NORMS: Mapping[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
}
"""The masked form of each normalisation by the operator's name."""
