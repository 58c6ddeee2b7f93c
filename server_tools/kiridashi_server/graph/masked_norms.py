"""Normalisations whose statistics are weighted means over channels, as the masked dense program needs them.

With weights of one they are the plain normalisations; a channel of weight zero is not there: neither its values
nor its place count, as in the program that is cut. Weights may be anything that does not sum to zero or less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_TINY = 1e-30


def layer_norm(
    gate: Tensor,
    input: Tensor,  # noqa: A002 (the arguments have the names of the operator's schema)
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cudnn_enable: bool,
) -> Tensor:
    """Layer normalisation over the last axis of ``input`` with weights ``gate`` [channels]."""
    share = gate / gate.sum().clamp_min(_TINY)
    centred = input - (input * share).sum(-1, keepdim=True)
    result = centred * torch.rsqrt((centred.square() * share).sum(-1, keepdim=True) + eps)
    return _affine(result, weight, bias)


def rms_norm(
    gate: Tensor,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
) -> Tensor:
    """Root-mean-square normalisation over the last axis of ``input`` with weights ``gate`` [channels]."""
    share = gate / gate.sum().clamp_min(_TINY)
    floor = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * torch.rsqrt((input.square() * share).sum(-1, keepdim=True) + floor), weight, None)


def group_norm(
    gate: Tensor,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Group normalisation of ``input`` [N, channels, ...] with weights ``gate`` [channels], by their group's sum."""
    shares = gate.reshape(num_groups, -1)
    shares = (shares / shares.sum(1, keepdim=True).clamp_min(_TINY))[None, :, :, None]
    grouped = input.reshape(input.shape[0], num_groups, input.shape[1] // num_groups, -1)
    centred = grouped - (grouped * shares).sum(2, keepdim=True).mean(3, keepdim=True)
    variance = (centred.square() * shares).sum(2, keepdim=True).mean(3, keepdim=True)
    result = (centred * torch.rsqrt(variance + eps)).reshape(input.shape)
    return _affine(result, *_along_channels(input, weight, bias))


def batch_norm(
    gate: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: None,
    running_var: None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Batch normalisation of ``input`` [N, channels, L, ...] by its own statistics, with weights ``gate`` [L]."""
    share = (gate / gate.sum().clamp_min(_TINY)).reshape(-1, *[1] * (input.dim() - 3))
    others = [0, *range(3, input.dim())]
    centred = input - (input * share).sum(2, keepdim=True).mean(others, keepdim=True)
    variance = (centred.square() * share).sum(2, keepdim=True).mean(others, keepdim=True)
    return _affine(centred * torch.rsqrt(variance + eps), *_along_channels(input, weight, bias))


def _along_channels(values: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors [channels] in a shape that broadcasts over ``values`` [N, channels, ...]."""
    shape = [-1, *[1] * (values.dim() - 2)]
    return [None if vector is None else vector.reshape(shape) for vector in vectors]


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = values if weight is None else values * weight
    return scaled if bias is None else scaled + bias


MASKED_NORMS: Mapping[str, Callable[..., Tensor]] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
}
"""The masked form of each normalisation by the operator's name; called with the weights and its arguments."""
