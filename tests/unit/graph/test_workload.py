"""Work and activations of cuts, counted from unit counts, against the cut networks themselves."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi_server.graph import Plan, capture, cut, track
from kiridashi_server.graph.quantities import Quantities
from torch import Tensor, fx, nn

BLOCK = 8


class Block(nn.Module):
    """An expansion with a depthwise convolution, a skip connection and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.expand = nn.Conv2d(12, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 12, 1)
        self.side = nn.Conv2d(12, 10, 1)
        self.last = nn.Conv2d(22, 16, 1)

    def forward(self, images: Tensor) -> Tensor:
        stem = torch.relu(self.stem(images))
        inner = torch.relu(self.depthwise(torch.relu(self.expand(stem))))
        stream = stem + self.project(inner)
        both = torch.cat([stream, self.side(stream)], dim=1)
        return self.last(both).mean(dim=(2, 3))


class Attention(nn.Module):
    """Self-attention with three heads of four channels, then a gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(20, 12) for _ in range(3))
        self.out = nn.Linear(12, 20)
        self.hidden = nn.Linear(20, 40)
        self.back = nn.Linear(40, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.back(nn.functional.gelu(self.hidden(self.out(mixed)))).mean(dim=1)


def prepared(module: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Quantities]:
    program = capture(module, example)
    return program, Quantities.of(program, track(program, cuttable_output=True))


CNN, CNN_QUANTITIES = prepared(Block(), torch.zeros(1, 3, 6, 6))
VIT, VIT_QUANTITIES = prepared(Attention(), torch.zeros(1, 5, 20))


def small(program: fx.GraphModule, widths: Mapping[str, int]) -> fx.GraphModule:
    tracking = track(program, cuttable_output=True)
    plan = Plan.of(tracking.layout, {name: range(width) for name, width in widths.items()})
    return cut(program, tracking, plan)


def filled(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def ragged(width: int) -> int:
    return 0 if width % BLOCK == 0 else width


def counted(module: fx.GraphModule, pixels: int) -> dict[str, float]:
    """The work of a network by the shapes of its weights."""
    weights = {name.removesuffix(".weight"): p for name, p in module.named_parameters() if name.endswith(".weight")}
    total = dict.fromkeys(("dense", "dense-ragged", "depthwise", "depthwise-ragged", "weights"), 0.0)
    total["weights"] = sum(parameter.numel() for parameter in module.parameters())
    for name, weight in weights.items():
        made, read, *kernel = weight.shape
        size = pixels * (kernel[0] * kernel[1] if kernel else 1)
        if name == "depthwise":
            total["depthwise"] += size * made
            total["depthwise-ragged"] += size * ragged(made)
        else:
            total["dense"] += size * read * filled(made)
            total["dense-ragged"] += size * ragged(read) * made
    return total


def widths_of(quantities: Quantities) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({name: st.integers(1, size) for name, size in quantities.layout.sizes.items()})


@given(widths_of(CNN_QUANTITIES))
@settings(max_examples=25, deadline=None)
def test_convolutions_are_counted_as_the_cut_network_has_them(widths: dict[str, int]) -> None:
    module = small(CNN, widths)
    found = CNN_QUANTITIES.workload(BLOCK).at(widths)
    expected = counted(module, pixels=36)
    # What is concatenated is read as two blocks of channels, each filled or not by itself.
    stream, side = module.project.weight.shape[0], module.side.weight.shape[0]
    last = module.last.weight.shape[0]
    expected["dense-ragged"] += 36 * last * (ragged(stream) + ragged(side) - ragged(stream + side))
    assert {kind: found[kind] for kind in expected} == pytest.approx(expected)


@given(widths_of(VIT_QUANTITIES))
@settings(max_examples=25, deadline=None)
def test_linear_layers_and_attention_are_counted_with_heads_as_channels(widths: dict[str, int]) -> None:
    module = small(VIT, widths)
    found = VIT_QUANTITIES.workload(BLOCK).at(widths)
    expected = counted(module, pixels=5)
    del expected["depthwise"], expected["depthwise-ragged"]
    # Heads times channels of a head: a product of two groups is taken as it is, and not as ragged.
    made, read = module.value.weight.shape
    expected["dense"] -= 5 * read * (filled(made) - made)
    expected["dense-ragged"] -= 5 * ragged(made) * module.out.weight.shape[0]
    assert {kind: found[kind] for kind in expected} == pytest.approx(expected)
    channels = module.value.weight.shape[0]
    assert found["product"] == 5 * 5 * (module.query.weight.shape[0] + channels)
    assert found["slow"] == 5 * module.hidden.weight.shape[0]


def test_groups_that_are_left_out_are_whole() -> None:
    workload = CNN_QUANTITIES.workload(BLOCK)
    assert workload.at({}) == workload.at(dict(CNN_QUANTITIES.layout.sizes))


@given(widths_of(CNN_QUANTITIES))
@settings(max_examples=20, deadline=None)
def test_the_peak_of_activations_is_reached_and_never_passed(widths: dict[str, int]) -> None:
    """Counted by walking the cut network: the skip connection keeps the stem alive beside the expansion."""
    module = small(CNN, widths)
    stem, inner = module.stem.weight.shape[0], module.expand.weight.shape[0]
    side, last = module.side.weight.shape[0], module.last.weight.shape[0]
    places = {
        "stem": 3 + stem,
        "relu": 2 * stem,
        "inner": stem + 2 * inner,
        "project": stem + inner + stem,
        "add": 3 * stem,
        "side": stem + side,
        "cat": stem + side + stem + side,
        "last": stem + side + last,
    }
    assert CNN_QUANTITIES.alive(widths) <= 36 * max(places.values())
    even = {name: max(1, round(0.5 * size)) for name, size in CNN_QUANTITIES.layout.sizes.items()}
    if widths == even:
        assert CNN_QUANTITIES.alive(widths) == 36 * max(places.values())


def test_the_peak_of_the_dense_network_is_the_expansion_beside_the_skip() -> None:
    assert CNN_QUANTITIES.alive({}) == 36 * (12 + 2 * 24)
