"""Work of cuts, counted from unit counts, against the cut networks themselves."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi_server.graph import Plan, capture, cut, track
from kiridashi_server.graph.quantities import Quantities
from torch import Tensor, fx, nn

BLOCK = 8
VIEWS = {"unflatten", "transpose", "flatten"}


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


class Flattened(nn.Module):
    """Pooled maps of 2 x 2 positions that a linear layer reads as one dimension: four inputs for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.top = nn.Linear(40, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.top(nn.functional.max_pool2d(torch.relu(self.stem(images)), 3).flatten(1))


def prepared(module: nn.Module, example: Tensor) -> tuple[fx.GraphModule, Quantities]:
    program = capture(module, example)
    return program, Quantities.of(program, track(program, cuttable_output=True))


CNN, CNN_QUANTITIES = prepared(Block(), torch.zeros(1, 3, 6, 6))
VIT, VIT_QUANTITIES = prepared(Attention(), torch.zeros(1, 5, 20))
FLAT, FLAT_QUANTITIES = prepared(Flattened(), torch.zeros(1, 3, 6, 6))


def small(program: fx.GraphModule, widths: Mapping[str, int]) -> fx.GraphModule:
    tracking = track(program, cuttable_output=True)
    plan = Plan.of(tracking.layout, {name: range(width) for name, width in widths.items()})
    return cut(program, tracking, plan)


def filled(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def paired(width: int) -> int:
    return -(-width // (2 * BLOCK)) * 2 * BLOCK


def ragged(width: int) -> int:
    return 0 if width % BLOCK == 0 else width


def counted(module: fx.GraphModule, pixels: int) -> dict[str, float]:
    """The work of a network by the shapes of its weights."""
    weights = {name.removesuffix(".weight"): p for name, p in module.named_parameters() if name.endswith(".weight")}
    total = dict.fromkeys(("dense", "dense-paired", "dense-ragged", "depthwise", "depthwise-ragged", "weights"), 0.0)
    total["weights"] = sum(parameter.numel() for parameter in module.parameters())
    for name, weight in weights.items():
        made, read, *kernel = weight.shape
        size = pixels * (kernel[0] * kernel[1] if kernel else 1)
        if name == "depthwise":
            total["depthwise"] += size * made
            total["depthwise-ragged"] += size * ragged(made)
        else:
            total["dense"] += size * read * filled(made)
            total["dense-paired"] += size * read * paired(made)
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
    expected["dense-paired"] -= 5 * read * (paired(made) - made)
    expected["dense-ragged"] -= 5 * ragged(made) * module.out.weight.shape[0]
    assert {kind: found[kind] for kind in expected} == pytest.approx(expected)
    channels = module.value.weight.shape[0]
    assert found["product"] == 5 * 5 * (module.query.weight.shape[0] + channels)
    assert found["slow"] == 5 * module.hidden.weight.shape[0]


@pytest.mark.parametrize(("window", "large"), [(3, False), (5, True)])
def test_depthwise_windows_of_more_than_nine_taps_count_once_more(window: int, large: bool) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(16, 16, window, padding=window // 2, groups=16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    _, quantities = prepared(module, torch.zeros(1, 3, 6, 6))
    found = quantities.workload(BLOCK).at({})
    assert found["depthwise"] == 36 * window**2 * 16
    assert found.get("depthwise-large", 0) == (found["depthwise"] if large else 0)


def test_groups_that_are_left_out_are_whole() -> None:
    workload = CNN_QUANTITIES.workload(BLOCK)
    assert workload.at({}) == workload.at(dict(CNN_QUANTITIES.layout.sizes))


class Moved(fx.Interpreter):
    """Elements that a program's operators make and read, tallied while it runs on one sample."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.kinds = dict.fromkeys(("dense-in", "dense-out", "ragged-out", "depthwise-out", "slow", "other"), 0)
        self.depthwise = getattr(program, "depthwise", None)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = super().call_function(target, args, kwargs)
        name = target.__name__.partition(".")[0]
        if name in ("conv2d", "linear"):
            weight = args[1]
            if self.depthwise is not None and weight is self.depthwise.weight:
                self.kinds["depthwise-out"] += made.numel()
            else:
                read = weight.shape[1]
                self.kinds["dense-out"] += made.numel()
                self.kinds["dense-in"] += made.numel() // weight.shape[0] * read
                self.kinds["ragged-out"] += made.numel() if read % BLOCK else 0
        elif name == "gelu":
            self.kinds["slow"] += made.numel()
        elif name != "scaled_dot_product_attention" and name not in VIEWS:
            self.kinds["other"] += made.numel()
        return made


def moved(module: fx.GraphModule, example: Tensor) -> dict[str, int]:
    run = Moved(module)
    run.run(example)
    return run.kinds


def found_of(quantities: Quantities, widths: Mapping[str, int]) -> dict[str, float]:
    """What is moved, as counted from unit counts; kinds that there is nothing of are zero."""
    found = quantities.workload(BLOCK).at(widths)
    kinds = ("dense-in", "dense-out", "ragged-out", "depthwise-out", "slow", "other")
    return {kind: found.get(kind, 0.0) for kind in kinds}


@given(widths_of(CNN_QUANTITIES))
@settings(max_examples=25, deadline=None)
def test_what_convolutions_move_is_what_the_cut_network_moves(widths: dict[str, int]) -> None:
    module = small(CNN, widths)
    expected = moved(module, torch.zeros(1, 3, 6, 6))
    stream, side = module.project.weight.shape[0], module.side.weight.shape[0]
    odd = [width % BLOCK != 0 for width in (stream, side, stream + side)]
    expected["ragged-out"] += 36 * module.last.weight.shape[0] * (odd[0] + odd[1] - odd[2])
    assert found_of(CNN_QUANTITIES, widths) == expected


@given(widths_of(VIT_QUANTITIES))
@settings(max_examples=25, deadline=None)
def test_what_attention_moves_is_what_the_cut_network_moves(widths: dict[str, int]) -> None:
    module = small(VIT, widths)
    expected = moved(module, torch.zeros(1, 5, 20))
    made, read = module.out.weight.shape
    expected["ragged-out"] -= 5 * made if read % BLOCK else 0  # heads times channels of a head, as above
    assert found_of(VIT_QUANTITIES, widths) == expected


@given(widths_of(FLAT_QUANTITIES))
@settings(max_examples=25, deadline=None)
def test_a_dimension_of_several_elements_a_unit_fills_blocks_with_all_of_them(widths: dict[str, int]) -> None:
    module = small(FLAT, widths)
    (stem, _, *_), (top, read) = module.stem.weight.shape, module.top.weight.shape
    assert read == 4 * stem
    found = FLAT_QUANTITIES.workload(BLOCK).at(widths)
    assert found["dense"] == 36 * 27 * filled(stem) + read * filled(top)
    assert found["dense-ragged"] == 36 * 27 * stem + ragged(read) * top
    assert found["weights"] == sum(parameter.numel() for parameter in module.parameters())
    assert found_of(FLAT_QUANTITIES, widths) == moved(module, torch.zeros(1, 3, 6, 6))
