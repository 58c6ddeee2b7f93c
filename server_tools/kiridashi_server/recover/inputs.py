"""From stored images to batches for the model, with light augmentation from a seeded generator."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from kiridashi.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from kiridashi_server.backbone import Backbone

_ROTATION = math.radians(8)
_SCALE, _SHIFT, _BRIGHTNESS, _CONTRAST = 0.1, 0.12, 0.1, 0.2


def to_input(backbone: Backbone, images: npt.NDArray[np.uint8]) -> Tensor:
    """Normalised input for the backbone, float32 [N, 3, H, W], laid out as it computes fastest.

    Args:
        backbone: names the size and the normalisation.
        images: uint8 [N, H, W, 3], RGB.

    Raises:
        InputError: the images have another size.
    """
    _, height, width = backbone.input_size
    if images.shape[1:3] != (height, width):
        raise InputError(
            f"images are {images.shape[1]} x {images.shape[2]} pixels, the backbone was loaded for {height} x {width}",
            next_step="load the task or the backbone at the other's image size",
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return backbone.normalise(pixels).contiguous(memory_format=backbone.memory_format)


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Slightly turned, scaled, shifted and re-lit copies of a normalised batch; same shape and layout.

    Turns to 8 degrees, scales to 10 %, shifts to 6 % of the side (borders repeat), contrast to 20 %, and brightness to
    a tenth of a standard deviation. No mirroring: left and right can be what a task is about.
    """
    count = batch.shape[0]

    def uniform(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, scale = uniform(_ROTATION), 1 + uniform(_SCALE)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale * torch.cos(angle)
    theta[:, 1, 0] = scale * torch.sin(angle)
    theta[:, 0, 1] = -theta[:, 1, 0]
    theta[:, :, 2] = torch.stack([uniform(_SHIFT), uniform(_SHIFT)], dim=1)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    moved = functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    contrast, brightness = 1 + uniform(_CONTRAST), uniform(_BRIGHTNESS)
    lit = moved * contrast.reshape(-1, 1, 1, 1) + brightness.reshape(-1, 1, 1, 1)
    return lit.contiguous(memory_format=torch.channels_last) if _is_channels_last(batch) else lit


def _is_channels_last(batch: Tensor) -> bool:
    return batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()


def shuffled_batches(inputs: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """All inputs once, in random order, in batches of nearly equal size, none above ``batch_size``."""
    order = torch.randperm(len(inputs), generator=generator)
    return [inputs[part] for part in order.tensor_split(math.ceil(len(inputs) / batch_size))]


def training_batches(
    inputs: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches without end; every sample is seen once before any is seen again.

    Yields:
        Inputs float32 [B, 3, H, W] and labels int64 [B], B the smaller of ``batch_size`` and the sample count.
    """
    batch_size = min(batch_size, len(inputs))
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(len(inputs), generator=generator)])
        chosen, queue = queue[:batch_size], queue[batch_size:]
        yield augment(inputs[chosen], generator), labels[chosen]


@torch.no_grad()
def run_batched(module: nn.Module, inputs: Tensor, batch_size: int = 64) -> Tensor:
    """The module's output for all inputs, batch by batch, without gradients."""
    return torch.cat([module(part) for part in torch.split(inputs, batch_size)])
