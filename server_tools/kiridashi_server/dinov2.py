"""DINOv2 ViT-S/14 (Oquab et al. 2023, arXiv 2304.07193), rebuilt from a graph that carries its weights.

A vision transformer: patches of 14 x 14 pixels become tokens, a class token stands before them, and every block adds
attention and an MLP to the stream, each behind a layer normalisation and scaled for each channel (LayerScale). The
position embeddings belong to 37 x 37 patches and are resized once, when the weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 14
_EPSILON = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision transformer.

    ``hidden`` is the width inside an MLP, ``patch`` a patch's side in pixels, ``grid`` the patches along a side.
    """

    width: int = 384
    hidden: int = 1536
    heads: int = 6
    blocks: int = 12
    patch: int = PATCH
    grid: int = 5


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_size = shape.width // shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.output = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        joined: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return joined


class _Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=_EPSILON)
        self.attention = _Attention(shape)
        self.scale1 = nn.Parameter(torch.ones(shape.width))
        self.norm2 = nn.LayerNorm(shape.width, eps=_EPSILON)
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)
        self.scale2 = nn.Parameter(torch.ones(shape.width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x)) * self.scale1
        hidden: Tensor = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x + hidden * self.scale2


class VisionTransformer(nn.Module):
    """Images [N, 3, H, W], H = W = ``patch * grid``, to features [N, width]: the class token, normalised.

    Args:
        shape: sizes; weights are as ``torch.nn`` initialises them.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, shape.width, shape.patch, stride=shape.patch)
        self.start = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, shape.width))
        self.blocks = nn.Sequential(*(_Block(shape) for _ in range(shape.blocks)))
        self.norm = nn.LayerNorm(shape.width, eps=_EPSILON)

    def tokens(self, images: Tensor) -> Tensor:
        """All tokens behind the last normalisation, [N, 1 + grid^2, width]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(images.shape[0], -1, -1), patches], dim=1) + self.position
        normalised: Tensor = self.norm(self.blocks(x))
        return normalised

    def forward(self, images: Tensor) -> Tensor:
        """Features, [N, width]."""
        return self.tokens(images)[:, 0]


def read_dinov2(path: Path, image_size: int) -> VisionTransformer:
    """ViT-S/14 for square images of ``image_size`` pixels, with the weights of an ONNX file.

    Args:
        path: an ONNX graph whose first part is the network, exported with its module names.
        image_size: a multiple of ``PATCH``.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            # The exporter folded the transposition of linear layers and dropped the names of their weights.
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            arrays[f"{name}.weight"] = arrays[node.input[1]].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/"):
            known = [name for name in node.input if name in arrays and arrays[name].dim() == 3]
            if node.op_type == "Reshape" and known:
                arrays["patch_positions"] = arrays[known[0]]
            elif node.op_type == "Concat" and len(known) == 1:
                arrays["start_position"] = arrays[known[0]]
    grid = image_size // PATCH
    model = VisionTransformer(Shape(grid=grid))
    model.load_state_dict(_renamed(arrays, grid))
    return model.eval()


_BLOCK_NAMES = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.output": "attention.output.dense",
    "norm1": "norm1",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def _renamed(arrays: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The network's state by our names."""
    state = {
        "start": arrays["backbone.embeddings.cls_token"],
        "position": torch.cat([arrays["start_position"], _resized(arrays["patch_positions"], grid)], dim=1),
    }
    layers = {"patches": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for index in range(Shape().blocks):
        theirs = f"encoder.layer.{index}"
        for half in (1, 2):
            state[f"blocks.{index}.scale{half}"] = arrays[f"backbone.{theirs}.layer_scale{half}.lambda1"]
        layers |= {f"blocks.{index}.{our}": f"{theirs}.{name}" for our, name in _BLOCK_NAMES.items()}
    for our, name in layers.items():
        for part in ("weight", "bias"):
            state[f"{our}.{part}"] = arrays[f"backbone.{name}.{part}"]
    return state


def _resized(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, g^2, width] of a square grid, resized to [1, grid^2, width]."""
    side = round(positions.shape[1] ** 0.5)
    plane = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return functional.interpolate(plane, size=(grid, grid), mode="bicubic").flatten(2).transpose(1, 2)
