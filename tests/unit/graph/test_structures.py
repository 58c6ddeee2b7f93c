"""One tiny model for each structure that people deploy: cut exactly, or frozen and saying why."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kiridashi_server.graph import CostModel, Plan, Tracking, capture, cut, fold_batch_norm, masked, track
from torch import Tensor, fx, nn
from torch.nn import functional

Captured = tuple[fx.GraphModule, Tracking]


class GroupedConvolution(nn.Module):
    """Channels in groups, before and after full convolutions; another number of groups in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(24)
        self.again = nn.Conv2d(24, 12, 1, groups=6)
        self.leave = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.sigmoid(self.again(torch.sigmoid(self.norm(self.grouped(self.enter(x)))))))


class GroupedResidual(nn.Module):
    """A ResNeXt block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.expand = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.elu(x + self.expand(functional.elu(self.grouped(functional.elu(self.reduce(x))))))
        return self.head(x.mean((2, 3)))


class ChannelShuffle(nn.Module):
    """ShuffleNet's unit: grouped, shuffled by reshaping, depthwise, grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.first = nn.Conv2d(8, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 8, 1, groups=2)
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(self.enter(x)))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        x = functional.channel_shuffle(self.depthwise(x), 4)
        return self.leave(torch.sigmoid(self.second(x)))


class Transposed(nn.Module):
    """Transposed convolutions: full, grouped and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.ConvTranspose2d(6, 9, 3, padding=1, groups=3)
        self.depthwise = nn.ConvTranspose2d(9, 9, 2, groups=9)
        self.leave = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.up(self.enter(x))))
        return self.leave(torch.sigmoid(self.depthwise(torch.sigmoid(self.grouped(x)))))


class Attention(nn.Module):
    """Separate query, key and value; the fused operator with its scale given, or by the heads' size."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.enter = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)
        self.leave = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.flatten(2).transpose(1, 2))
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.leave(x.mean(1))


class GroupedQueries(nn.Module):
    """Four heads of queries, two of keys and values; ``how`` the latter are shared."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.enter = nn.Linear(3, 8)
        self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x.flatten(2).transpose(1, 2)))
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, 4, 3).transpose(1, 2)
        k, v = (layer(x).view(batch, tokens, 2, 3).transpose(1, 2) for layer in (self.key, self.value))
        if self.how == "expand":
            k, v = (t[:, :, None].expand(batch, 2, 2, tokens, 3).reshape(batch, 4, tokens, 3) for t in (k, v))
        if self.how == "interleave":
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "operator")
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 12)).mean(1)


class PositionBias(nn.Module):
    """Windowed attention as in Swin: rolled, cut into windows, with an indexed table of biases by head."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 2, stride=2)
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.zeros(9, 4))
        steps = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        away = (steps[:, :, None] - steps[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("places", away[..., 0] * 3 + away[..., 1])
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.enter(x).permute(0, 2, 3, 1), shifts=(-1, -1), dims=(1, 2))
        batch = x.shape[0]
        x = x.view(batch, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        q, k, v = self.qkv(x).view(-1, 4, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.places.view(-1)].view(4, 4, 4).permute(2, 0, 1)
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.7 + bias[None], dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, -1, 8)).mean(1)


class Einsum(nn.Module):
    """Attention and a weight applied by ``einsum``, and a product with a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 8)
        self.query = nn.Parameter(torch.zeros(8, 3, 4))
        self.key = nn.Parameter(torch.zeros(8, 3, 4))
        self.value = nn.Parameter(torch.zeros(3, 8, 5))
        self.out = nn.Parameter(torch.zeros(15, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x.flatten(2).transpose(1, 2)))
        q, k = torch.einsum("btc,chd->bthd", x, self.query), torch.einsum("btc,chd->bthd", x, self.key)
        v = torch.einsum("btc,hcd->bthd", x, self.value)
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.4, dim=-1)
        y = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return (y @ self.out).mean(1)


class Addmm(nn.Module):
    """GPT-2's layer, whose weight is [inputs, outputs], and its batched form."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.weight = nn.Parameter(torch.zeros(6, 10))
        self.bias = nn.Parameter(torch.zeros(10))
        self.other = nn.Parameter(torch.zeros(1, 10, 4))
        self.leave = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.addmm(self.bias, torch.tanh(self.enter(x.mean((2, 3)))), self.weight))
        x = torch.baddbmm(x.new_zeros(1, 1, 1), x[None], self.other)[0]
        return self.leave(torch.tanh(x))


class CrossStagePartial(nn.Module):
    """YOLO's C2f: split in two, bottlenecks with a shortcut, everything joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.down = nn.ModuleList(nn.Conv2d(6, 5, 3, padding=1) for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(5, 6, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(24, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(functional.silu(self.norm(self.first(x))).chunk(2, 1))
        for down, up in zip(self.down, self.up, strict=True):
            parts.append(parts[-1] + torch.sigmoid(up(torch.sigmoid(down(parts[-1])))))
        return self.head(torch.sigmoid(self.last(torch.cat(parts, 1))))


class SpatialPyramid(nn.Module):
    """YOLO's SPPF: one map pooled again and again, all of them joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [torch.sigmoid(self.first(x))]
        for _ in range(3):
            maps.append(functional.max_pool2d(maps[-1], 3, 1, 1))
        return self.last(torch.cat(maps, 1))


class SqueezeExcite(nn.Module):
    """Channels scaled by a linear bottleneck over their means."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scale = torch.sigmoid(self.excite(torch.sigmoid(self.squeeze(x.mean((2, 3))))))
        return self.last(x * scale[:, :, None, None])


class GroupNorm(nn.Module):
    """Whole groups of a group normalisation can go; an instance normalisation has groups of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12)
        self.second, self.single = nn.Conv2d(12, 6, 1), nn.InstanceNorm2d(6, affine=True)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.single(self.second(torch.sigmoid(self.norm(self.first(x)))))))


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation: each channel's norm over the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 3)
        self.scale, self.shift = nn.Parameter(torch.zeros(1, 1, 1, 8)), nn.Parameter(torch.zeros(1, 1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.first(x.permute(0, 2, 3, 1)))
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        x = self.scale * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.shift + x
        return self.last(x).sum((1, 2))


class CosineAttention(nn.Module):
    """Queries and keys divided by their norms, as in Swin V2, and a learnt scale for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8)
        self.scale = nn.Parameter(torch.zeros(2, 1, 1))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        y = torch.softmax(scores * self.scale.clamp(max=3).exp(), -1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).mean(1)


class ChannelScales(nn.Module):
    """PReLU with a slope for each channel and for all, a learnt scale, and a layer scale on a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        self.each, self.all = nn.PReLU(8), nn.PReLU()
        self.scale, self.layer_scale = nn.Parameter(torch.zeros(8, 1, 1)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(self.first(x)) * self.scale
        y = (self.second(x).permute(0, 2, 3, 1) * self.layer_scale).permute(0, 3, 1, 2)
        return self.last(self.all(x + y))


class PixelShuffle(nn.Module):
    """Channels to positions (super-resolution) and back (space to depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 1)
        self.second = nn.Conv2d(6, 5, 1)
        self.third = nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.second(functional.pixel_shuffle(self.first(x), 2)))
        return self.third(functional.pixel_unshuffle(x, 2))


class PatchEmbedding(nn.Module):
    """Patches by unfolding and by reshaping, with class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.unfolded, self.reshaped = nn.Linear(64, 10), nn.Linear(64, 10)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 10)), nn.Parameter(torch.zeros(1, 5, 10))
        self.last = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.stem(x))
        batch = x.shape[0]
        first = self.unfolded(functional.unfold(x, 4, stride=4).transpose(1, 2))
        patches = x.reshape(batch, 4, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(batch, 4, 64)
        tokens = torch.cat([self.token.expand(batch, -1, -1), first + self.reshaped(patches)], 1) + self.position
        return self.last(torch.sigmoid(tokens)).mean(1)


class GatedLinear(nn.Module):
    """SwiGLU from two weights, and a gated linear unit from one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(3, 10), nn.Linear(3, 10), nn.Linear(10, 6)
        self.both, self.last = nn.Linear(6, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        x = self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.last(functional.glu(self.both(x), -1))


class Recurrent(nn.Module):
    """Recurrent layers stay whole; what is before and after them does not, where they do not touch it."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.enter, self.narrow = nn.Linear(3, 7), nn.Linear(7, 6)
        self.layer = layer(6, 5, batch_first=True)
        self.wide, self.last = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.layer(self.narrow(torch.tanh(self.enter(x.flatten(2).transpose(1, 2)))))
        return self.last(torch.tanh(self.wide(x))).mean(1)


class Shared(nn.Module):
    """One module at three places, with its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.block(x) + self.block(functional.avg_pool2d(self.block(x), 3, 1, 1)))


class FrozenWeights(nn.Module):
    """Weights that are not trained, in the middle of ones that are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
        self.layers[2].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Upsampled(nn.Module):
    """A feature pyramid: resampled, added, stacked and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = functional.interpolate(self.low(x), size=(8, 8), mode="bilinear")
        high = torch.sigmoid(self.high(x)) + low
        return self.head(torch.stack([high, torch.tanh(low)]).mean(0))


class Repeated(nn.Module):
    """Channels repeated as a whole and one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(12, 5, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.second(torch.sigmoid(self.first(x)).repeat(1, 3, 1, 1)))
        return self.last(torch.repeat_interleave(x, 2, dim=1))


class Volumes(nn.Module):
    """A weight with normalised rows; a convolution over volumes, pooled; maxima with their places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 1))
        self.second = nn.Conv3d(6, 5, 1)
        self.third = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = functional.max_pool2d(self.first(x), 2, return_indices=True)
        x = functional.max_pool3d(torch.tanh(self.second(x[:, :, None].expand(-1, -1, 2, -1, -1))), 2).squeeze(2)
        return self.third(functional.adaptive_max_pool2d(functional.softshrink(x), 1))


class Moved(nn.Module):
    """Axes moved, tiled and run over; products with vectors and with dots for what is passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 1)
        self.weight = nn.Parameter(torch.randn(7, 6))
        self.vector = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = torch.tensor_split(self.first(x), 3, 1)
        x = torch.cat([*others, first], 1).cumsum(2).movedim(1, -1)
        x = torch.sigmoid(torch.einsum("...c,cd->...d", x, self.weight))
        return torch.matmul(x.tile(2, 1), self.vector).flatten(1)


class Sampled(nn.Module):
    """Embedded codes, sampled features, and the best of them picked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.where, self.table = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Embedding(5, 6)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = functional.grid_sample(x, torch.tanh(self.where(x)).permute(0, 2, 3, 1), align_corners=False)
        x = torch.sigmoid(x) + self.table(torch.arange(4)).sum(0)[:, None, None]
        return self.last(x).flatten(2).topk(3, dim=-1).values


class Standardised(nn.Module):
    """Convolutions whose weights are normalised over their inputs, as in BiT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        flat = functional.batch_norm(weight.reshape(1, 8, -1), None, None, training=True, momentum=0.0)
        x = functional.conv2d(torch.sigmoid(self.first(x)), flat.reshape_as(weight), self.second.bias)
        return self.last(torch.sigmoid(x))


class Folded(nn.Module):
    """Patches unfolded, worked on and folded together again, as in MobileViT V2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = functional.unfold(torch.sigmoid(self.first(x)), 2, stride=2).reshape(-1, 5, 4, 16)
        patches = torch.sigmoid(self.middle(patches)).reshape(-1, 24, 16)
        return self.last(functional.fold(patches, (8, 8), 2, stride=2))


class Selected(nn.Module):
    """The best tokens are gathered, as in two-stage detectors; one output has no axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rate, self.leave = nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(6, 2)
        self.weights = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.sigmoid(self.enter(x.flatten(2).transpose(1, 2)))
        best = self.rate(tokens)[..., 0].topk(5, dim=1).indices
        tokens = tokens.gather(1, best[:, :, None].repeat(1, 1, 6))
        return self.leave(tokens) + functional.linear(tokens, self.weights)[:, :, None]


class SinePositions(nn.Module):
    """Positions from sines and cosines, computed in the graph from the input's sizes, added to channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.level, self.leave = nn.Linear(3, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.enter(x.flatten(2).transpose(1, 2))
        places = x.new_ones(x.shape[0], 64).cumsum(1)[:, :, None] / torch.arange(1, 9)
        positions = torch.stack([places[..., 0::2].sin(), places[..., 1::2].cos()], dim=3).flatten(2)
        return self.leave(torch.sigmoid(tokens + (positions + self.level))).mean(1)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "grouped convolution": (
        GroupedConvolution,
        {"enter": 3, "enter:filter2": 4, "grouped": 2, "grouped:filter2": 4, "again": 2},
    ),
    "grouped residual": (GroupedResidual, {"stem": 8, "reduce": 2, "reduce:filter2": 3, "grouped": 3}),
    "channel shuffle": (ChannelShuffle, {"enter": 2, "enter:filter2": 4, "first": 4, "second": 4}),
    "transposed convolution": (Transposed, {"enter": 8, "up": 3, "up:filter2": 2, "grouped": 3}),
    "attention": (Attention, {"query:head": 3, "value": 4}),
    "attention with a scale": (lambda: Attention(0.5), {"query:head": 3, "query": 4, "value": 4}),
    "grouped queries, expanded": (
        lambda: GroupedQueries("expand"),
        {"enter": 8, "query:head": 2, "query:head2": 2, "value": 3},
    ),
    "grouped queries, interleaved": (
        lambda: GroupedQueries("interleave"),
        {"enter": 8, "query:head": 2, "query:head2": 2, "value": 3},
    ),
    "grouped queries, in the operator": (
        lambda: GroupedQueries("operator"),
        {"enter": 8, "query:head": 2, "query:head2": 2, "value": 3},
    ),
    "position bias": (PositionBias, {"enter": 8, "qkv:head": 4, "qkv": 2}),
    "einsum": (Einsum, {"enter": 8, "key:head": 3, "key": 4, "out": 5}),
    "addmm": (Addmm, {"enter": 6, "weight": 10, "leave": 4}),
    "cross-stage partial": (CrossStagePartial, {"first": 6, "first:filter2": 6, "down.0": 5, "down.1": 5, "last": 8}),
    "spatial pyramid": (SpatialPyramid, {"first": 5}),
    "squeeze and excite": (SqueezeExcite, {"first": 8, "squeeze": 4}),
    "group normalisation": (GroupNorm, {"first": 4, "second": 6}),
    "response normalisation": (ResponseNorm, {"first": 8}),
    "cosine attention": (CosineAttention, {"query:head": 2, "query": 4, "value": 4}),
    "scales": (ChannelScales, {"first": 8}),
    "pixel shuffle": (PixelShuffle, {"first": 6, "second": 5}),
    "patch embedding": (PatchEmbedding, {"stem": 4, "unfolded": 10}),
    "gated linear": (GatedLinear, {"gate": 10, "down": 6, "both": 4}),
    "lstm": (lambda: Recurrent(nn.LSTM), {"enter": 7, "wide": 8}),
    "gru": (lambda: Recurrent(nn.GRU), {"enter": 7, "wide": 8}),
    "shared module": (Shared, {"stem": 6}),
    "frozen weights": (FrozenWeights, {"layers.0": 6, "layers.2": 5}),
    "feature pyramid": (Upsampled, {"low": 6}),
    "repeated": (Repeated, {"first": 4, "second": 5, "second:node2": 3, "last": 2}),
    "weight standardisation": (Standardised, {"second": 8}),
    "folded patches": (Folded, {"first": 5, "middle": 6}),
    "selected tokens": (Selected, {"enter": 6}),
    "sine positions": (SinePositions, {"enter": 8}),
    "sampled": (Sampled, {"first": 6}),
    "volumes": (Volumes, {"first.parametrizations.weight.original1": 6, "second": 5}),
    "moved": (Moved, {"first": 2, "first:filter2": 2, "first:filter3": 3, "vector": 6}),
}


REASONS = {
    "attention": {"norm.weight": "layer normalisation"},
    "attention with a scale": {"norm.weight": "layer normalisation"},
    "patch embedding": {"position": "position"},
    "weight standardisation": {"first.weight": "batch normalisation"},
    "lstm": {"narrow.weight": "operator without a rule here: lstm"},
    "gru": {"layer.weight_hh_l0": "operator without a rule here: gru"},
    "position bias": {"table": "indexed"},
    "sampled": {"where.weight": "sampled"},
}
"""What stays frozen, apart from inputs and outputs, and why."""


def half(tracking: Tracking, names: list[str], seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    sizes = {name: tracking.layout.sizes[name] for name in names}
    return Plan.of(
        tracking.layout, {name: rng.choice(size, max(1, size // 2), replace=False) for name, size in sizes.items()}
    )


def assert_exact(program: fx.GraphModule, tracking: Tracking, plan: Plan, images: Tensor) -> fx.GraphModule:
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    for batch in (images, images[:1]):
        torch.testing.assert_close(small(batch), dense(batch), rtol=0, atol=1e-12)
    return small


@pytest.fixture(scope="module", params=STRUCTURES)
def structure(request: pytest.FixtureRequest, images: Tensor, randomise: Callable[[nn.Module], nn.Module]) -> Captured:
    program = capture(randomise(STRUCTURES[request.param][0]()), images)
    return program, track(program)


def test_groups_and_reasons(request: pytest.FixtureRequest, structure: Captured) -> None:
    name = request.node.callspec.params["structure"]
    _, tracking = structure
    assert dict(tracking.layout.sizes) == STRUCTURES[name][1]
    reasons = {axis.parameter: axis.reason for axis in tracking.layout.frozen if axis.reason not in ("input", "output")}
    for parameter, reason in REASONS.get(name, {}).items():
        assert reasons[parameter] == reason
    assert bool(reasons) == bool(REASONS.get(name))
    assert dict(tracking.unknown) == ({name: 1} if name in ("lstm", "gru") else {})


def test_each_group_by_itself(structure: Captured, images: Tensor) -> None:
    program, tracking = structure
    for name in tracking.layout.sizes:
        plan = half(tracking, [name], seed=0)
        assert_exact(program, tracking, plan, images)
        assert (masked(program, tracking, plan)(images) - program(images)).abs().max() > 1e-6, name


@pytest.mark.parametrize("seed", [1, 2])
def test_half_of_every_group(structure: Captured, images: Tensor, seed: int) -> None:
    program, tracking = structure
    plan = half(tracking, list(tracking.layout.sizes), seed)
    small = assert_exact(program, tracking, plan, images)
    torch.testing.assert_close(fold_batch_norm(small)(images), small(images), rtol=0, atol=1e-10)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    assert CostModel.from_tracking(tracking).parameters(plan.counts) == parameters
    again = track(small)
    assert {size for size in again.layout.sizes.values() if size > 1} <= set(plan.counts.values()) | {
        first * second for first in plan.counts.values() for second in plan.counts.values()
    }
    assert_exact(small, again, half(again, list(again.layout.sizes), seed), images)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("attention", {"enter": 8, "query:head": 3, "value": 4}),
        ("weight standardisation", {"first": 6, "second": 8}),
        ("group normalisation", {"first": 4, "first:filter2": 3, "second": 6}),
    ],
)
def test_normalised_units_are_cut_when_asked_for(
    name: str, groups: dict[str, int], images: Tensor, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    """The statistics are those of the kept units, in the cut and in the masked dense program."""
    program = capture(randomise(STRUCTURES[name][0]()), images)
    tracking = track(program, cut_normalised=True)
    assert dict(tracking.layout.sizes) == groups
    for seed in range(3):
        plan = half(tracking, list(groups), seed)
        assert_exact(program, tracking, plan, images)
        torch.testing.assert_close(masked(program, tracking, Plan.full(tracking.layout))(images), program(images))


@pytest.mark.parametrize(("eps", "affine"), [(None, True), (1e-3, False)])
def test_root_mean_square_normalisation(eps: float | None, affine: bool, images: Tensor) -> None:
    norm = nn.RMSNorm(8, eps=eps, elementwise_affine=affine)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), norm, nn.Linear(8, 2)).double()
    program = capture(model, images)
    assert track(program).layout.groups == ()
    tracking = track(program, cut_normalised=True)
    assert dict(tracking.layout.sizes) == {"1": 8}
    assert_exact(program, tracking, half(tracking, ["1"], 0), images)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
@pytest.mark.parametrize("name", ["grouped residual", "attention with a scale", "response normalisation"])
def test_other_dtypes_are_kept(
    name: str, dtype: torch.dtype, tolerance: float, images: Tensor, randomise: Callable[[nn.Module], nn.Module]
) -> None:
    images = images.to(dtype)
    program = capture(randomise(STRUCTURES[name][0]()).to(dtype), images)
    tracking = track(program)
    assert dict(tracking.layout.sizes) == STRUCTURES[name][1]
    plan = half(tracking, list(tracking.layout.sizes), 0)
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    result, expected = small(images), dense(images)
    assert result.dtype is expected.dtype is dtype
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_fixed_batch(images: Tensor, randomise: Callable[[nn.Module], nn.Module]) -> None:
    program = capture(randomise(PositionBias()), images, dynamic_batch=False)
    tracking = track(program)
    assert dict(tracking.layout.sizes) == STRUCTURES["position bias"][1]
    plan = half(tracking, list(tracking.layout.sizes), 0)
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    torch.testing.assert_close(small(images), dense(images), rtol=0, atol=1e-12)
