"""Tiny models that hold one kind of structure each, in float64 with random weights and statistics."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from kiridashi_server.graph import Tracking, capture, track
from torch import Tensor, fx, nn
from torch.nn import functional


class Residual(nn.Module):
    """Stem, inverted residual with depthwise convolution and squeeze-and-excitation, pooled features, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 12, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(12)
        self.squeeze = nn.Conv2d(12, 3, 1)
        self.excite = nn.Conv2d(3, 12, 1)
        self.project = nn.Conv2d(12, 8, 1)
        self.project_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.stem_norm(self.stem(x)))
        y = functional.silu(self.expand_norm(self.expand(x)))
        y = torch.sigmoid(self.depthwise_norm(self.depthwise(y)))  # sigmoid(0) is not 0
        y = y * torch.sigmoid(self.excite(functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project_norm(self.project(y))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Branches(nn.Module):
    """Two branches joined by ``cat``, split into unequal parts again, and a gated (chunked) linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.joined = nn.Conv2d(10, 9, 3)
        self.low = nn.Conv2d(4, 7, 1)
        self.high = nn.Conv2d(5, 7, 1)
        self.gated = nn.Linear(7, 12)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)))
        low, high = torch.split(self.joined(x), [4, 5], dim=1)
        x = (self.low(low) * self.high(high)).mean((2, 3))
        value, gate = self.gated(x).chunk(2, dim=-1)
        return self.head(value * torch.sigmoid(gate))


class Attention(nn.Module):
    """A transformer block with fused query, key and value, a class token and learnt positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.zeros(1, 5, 12))
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 3 * 12)
        self.out = nn.Linear(12, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.down(functional.gelu(self.up(x)))
        return self.head(x[:, 0])


class Unknown(nn.Module):
    """Channels that pass through an operator without a rule, between channels that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 5, 1)
        self.third = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.renorm(self.first(x), 2, 1, 1.0))).mean((2, 3))


def randomised(module: nn.Module) -> nn.Module:
    """The module in float64 with weights, statistics and affine parameters that hide no mistake."""
    generator = torch.Generator().manual_seed(7)
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.7)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.3)
    return module


MODELS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "branches": Branches,
    "attention": Attention,
    "unknown": Unknown,
}


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks run faster on one thread than on several that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Turns a module into float64 with random weights, always the same."""
    return randomised


@pytest.fixture(scope="session")
def make_model() -> Callable[[str], nn.Module]:
    """A tiny model by name, new at each call and always with the same weights."""
    return lambda name: randomised(MODELS[name]())


@pytest.fixture(scope="session")
def captured(images: Tensor) -> Callable[[str], tuple[fx.GraphModule, Tracking]]:
    """A tiny model's program and tracking by name; captured once, so it must not be changed."""

    @cache
    def capture_once(name: str) -> tuple[fx.GraphModule, Tracking]:
        program = capture(randomised(MODELS[name]()), images)
        return program, track(program)

    return capture_once


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
