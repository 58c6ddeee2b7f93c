"""Random networks made of the supported operators, random masks: the cut is always the masked dense program."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kiridashi_server.graph import CostModel, Plan, Tracking, capture, cut, masked, track
from torch import Tensor, fx, nn
from torch.nn import functional

SIDE = 4
WIDTHS = (4, 6, 8, 12)


class Block(nn.Module):
    """From maps [N, C, 4, 4] made so far to one more; ``choose`` decides all that is open."""

    width: int

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__()
        self.source = choose.randrange(len(widths))
        self.inputs = widths[self.source]


class Convolution(Block):
    """Full, grouped or depthwise; plain or transposed; with a bias or with batch normalisation."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        groups = choose.choice([1, 1, 2, self.inputs])
        self.width = self.inputs if groups == self.inputs else choose.choice(WIDTHS)
        kind = choose.choice([nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d])
        kernel = choose.choice([1, 3])
        norm = choose.random() < 0.5
        self.conv = kind(self.inputs, self.width, kernel, padding=kernel // 2, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(self.width) if norm else nn.Identity()

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.norm(self.conv(maps[self.source]))


class Pointwise(Block):
    """Activations, also with f(0) != 0, learnt slopes and scales, resampling of positions."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.width = self.inputs
        self.slope = nn.PReLU(choose.choice([1, self.width]))
        self.scale = nn.Parameter(torch.zeros(self.width, 1, 1))
        self.act = choose.choice([torch.sigmoid, torch.cos, functional.gelu, torch.exp, self._scaled, self.slope])
        self.pool = choose.choice([None, lambda x: functional.avg_pool2d(x, 3, 1, 1), self._resampled])

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.scale + 1

    @staticmethod
    def _resampled(x: Tensor) -> Tensor:
        return functional.interpolate(functional.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear")

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = torch.tanh(maps[self.source])
        return self.act(x if self.pool is None else self.pool(x))


class Sum(Block):
    """A shortcut between two maps of one width, or a product of them, or their mean."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.width = self.inputs
        self.other = choose.choice([place for place, width in enumerate(widths) if width == self.width])
        self.how = choose.choice([torch.add, torch.mul, torch.maximum, lambda a, b: torch.stack([a, b]).mean(0)])

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.how(maps[self.source], maps[self.other])


class Join(Block):
    """Two maps joined, perhaps shuffled, and perhaps taken apart in another order."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.other = choose.randrange(len(widths))
        self.sizes = [self.inputs, widths[self.other]]
        self.swap = choose.random() < 0.5
        self.first = choose.random() < 0.3
        self.width = self.sizes[1] if self.first and self.swap else self.sizes[0] if self.first else sum(self.sizes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = torch.cat([maps[self.source], maps[self.other]], 1)
        parts = list(torch.split(torch.tanh(x), self.sizes, 1))
        if self.swap:
            parts.reverse()
        return parts[0] if self.first else torch.cat(parts, 1)


class Gate(Block):
    """Squeeze and excite, a gated linear unit, or a response normalisation."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.how = choose.choice([self._excite, self._glu, self._respond])
        self.width = self.inputs
        hidden = choose.choice(WIDTHS)
        self.squeeze, self.excite = nn.Conv2d(self.width, hidden, 1), nn.Conv2d(hidden, self.width, 1)
        self.both = nn.Conv2d(self.width, 2 * self.width, 1)

    def _excite(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))))

    def _glu(self, x: Tensor) -> Tensor:
        return functional.glu(self.both(x), 1)

    def _respond(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + x * norm / (norm.mean(1, keepdim=True) + 0.1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.how(maps[self.source])


class Normalise(Block):
    """Layer, group or instance normalisation of channels."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.width = self.inputs
        self.last = nn.LayerNorm(self.width)
        grouped = [nn.GroupNorm(2, self.width), nn.GroupNorm(1, self.width), nn.InstanceNorm2d(self.width, affine=True)]
        self.norm = choose.choice([None, *grouped])

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[self.source]
        return self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.norm is None else self.norm(x)


class Attention(Block):
    """Heads over positions: fused or separate weights, shared keys, the operator or its parts."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.width = choose.choice(WIDTHS)
        self.heads, self.size = choose.choice([2, 4]), choose.choice([2, 3])
        self.shared = choose.choice([1, 2]) if choose.random() < 0.5 else 1
        pairs = self.heads // self.shared * self.size
        self.query, self.pair = nn.Linear(self.inputs, self.heads * self.size), nn.Linear(self.inputs, 2 * pairs)
        self.out = nn.Linear(self.heads * self.size, self.width)
        self.scale = choose.choice([None, 0.6])
        self.parts = choose.random() < 0.5

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = torch.tanh(maps[self.source]).flatten(2).transpose(1, 2)
        q = self.query(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (
            part.unflatten(-1, (self.heads // self.shared, self.size)).transpose(1, 2)
            for part in self.pair(x).chunk(2, -1)
        )
        if self.parts:
            k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k) * (self.scale or 0.5)
            y = torch.softmax(weights, -1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=self.shared > 1)
        return self.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(-1, (SIDE, SIDE))


class Shuffle(Block):
    """Channels shuffled, repeated, or moved to positions and back."""

    def __init__(self, choose: random.Random, widths: list[int]) -> None:
        super().__init__(choose, widths)
        self.how = choose.choice(["shuffle", "reshape", "repeat", "pixels", "rolled"])
        self.width = self.inputs * (4 if self.how == "pixels" else 2 if self.how == "repeat" else 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[self.source]
        if self.how == "shuffle":
            return functional.channel_shuffle(x, 2)
        if self.how == "reshape":
            return x.unflatten(1, (self.width // 2, 2)).transpose(1, 2).reshape(x.shape)
        if self.how == "repeat":
            return x.repeat(1, 2, 1, 1)
        if self.how == "pixels":
            return functional.pixel_unshuffle(functional.interpolate(x, scale_factor=2), 2)
        return torch.roll(x, (1, 2), (2, 3))


BLOCKS: list[Callable[[random.Random, list[int]], Block]] = [
    *([Convolution] * 3),
    Pointwise,
    Sum,
    Join,
    Gate,
    Normalise,
    Attention,
    Shuffle,
]


class Network(nn.Module):
    """A stem, random blocks that read any map before them, and two heads over different maps."""

    def __init__(self, blocks: list[int], seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        widths = [choose.choice(WIDTHS)]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for kind in blocks:
            self.blocks.append(BLOCKS[kind](choose, widths))
            widths.append(self.blocks[-1].width)
        self.places = [len(widths) - 1, choose.randrange(len(widths))]
        self.dense = nn.Sequential(nn.Conv2d(widths[self.places[0]], 5, 1), nn.Sigmoid(), nn.Conv2d(5, 2, 1))
        self.pooled = nn.Linear(widths[self.places[1]], 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(torch.tanh(block(maps)))
        return self.dense(maps[self.places[0]]), self.pooled(maps[self.places[1]].mean((2, 3)))


networks = st.tuples(st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=7), st.integers(0, 2**20))


@pytest.mark.parametrize("cut_normalised", [False, True])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(network=networks, mask=st.integers(0, 2**20))
def test_the_cut_is_the_masked_dense_network(
    cut_normalised: bool,
    network: tuple[list[int], int],
    mask: int,
    randomise: Callable[[nn.Module], nn.Module],
) -> None:
    generator = torch.Generator().manual_seed(mask)
    images = torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    program = capture(randomise(Network(*network)), images)
    tracking = track(program, cut_normalised=cut_normalised)
    assert not tracking.unknown
    assert tracking.layout.groups
    small = assert_exact(program, tracking, images, mask)
    assert_exact(small, track(small, cut_normalised=cut_normalised), images, mask + 1)


def assert_exact(program: fx.GraphModule, tracking: Tracking, images: Tensor, seed: int) -> fx.GraphModule:
    """Cut random units of all groups, compare, and give the result; its size is the one that was predicted."""
    rng = np.random.default_rng(seed)
    kept = {
        group.name: rng.choice(group.size, rng.integers(1, group.size + 1), replace=False)
        for group in tracking.layout.groups
    }
    plan = Plan.of(tracking.layout, kept)
    small, dense = cut(program, tracking, plan), masked(program, tracking, plan)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    assert CostModel.from_tracking(tracking).parameters(plan.counts) == parameters
    for batch in (images, images[:1]):
        for result, expected in zip(small(batch), dense(batch), strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    return small
