"""The peak of activations that are alive at once, against a count on the cut program and by hand."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi_server.graph import Plan, capture, cut, track
from kiridashi_server.graph.quantities import Quantities
from torch import Tensor, fx, nn

SHARES = (1.0, 0.7, 0.5, 0.35, 0.2, 0.1)


class Skip(nn.Module):
    """A narrow stream at 6 x 6 positions that a wide branch leaves and joins, then a top that is flattened.

    Dense, the branch beside the stream is the fullest place; narrowed, the 48 input channels are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(48, 12, 3, padding=1)
        self.expand = nn.Conv2d(12, 40, 1)
        self.project = nn.Conv2d(40, 12, 1)
        self.top = nn.Linear(12 * 4, 16)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.stem(images))
        stream = stream + self.project(torch.relu(self.expand(stream)))
        return self.top(nn.functional.max_pool2d(stream, 3).flatten(1))


class Views(nn.Module):
    """A result that is read late, through a view: it takes memory once, and until then."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 24)
        self.second = nn.Linear(24, 64)
        self.third = nn.Linear(64, 8)
        self.late = nn.Linear(24, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.first(tokens)
        turned = first.transpose(1, 2)
        third = self.third(self.second(first))
        return (third + self.late(turned.transpose(1, 2))).mean(dim=1)


EXAMPLES = {"skip": torch.zeros(1, 48, 6, 6), "views": torch.zeros(1, 5, 20)}
PROGRAMS = {name: capture(module, EXAMPLES[name]) for name, module in {"skip": Skip(), "views": Views()}.items()}
QUANTITIES = {name: Quantities.of(program, track(program, cuttable_output=True)) for name, program in PROGRAMS.items()}


class Results(fx.Interpreter):
    """Runs a program and keeps every result, so that no memory is used twice."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program, garbage_collect_values=False)


def counted(name: str, widths: Mapping[str, int]) -> int:
    """Elements alive at the fullest place of the cut program, by the memory that its results really lie in."""
    program = PROGRAMS[name]
    tracking = track(program, cuttable_output=True)
    plan = Plan.of(tracking.layout, {group: range(width) for group, width in widths.items()})
    module = cut(program, tracking, plan)
    run = Results(module)
    run.run(EXAMPLES[name])
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    elements: dict[int, int] = {}
    for node in order:
        if node.op in ("placeholder", "call_function"):
            memory = run.env[node].untyped_storage()
            first.setdefault(memory.data_ptr(), order[node])
            elements[memory.data_ptr()] = memory.nbytes() // run.env[node].element_size()
            last[memory.data_ptr()] = max(order[user] for user in node.users)
    return max(
        sum(elements[memory] for memory in first if first[memory] <= place <= last[memory]) for place in order.values()
    )


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("share", SHARES)
def test_the_peak_of_an_even_narrowing_is_what_is_alive_in_the_cut_program(name: str, share: float) -> None:
    widths = {group: max(1, round(share * size)) for group, size in QUANTITIES[name].layout.sizes.items()}
    assert QUANTITIES[name].alive(widths) == counted(name, widths)


@pytest.mark.parametrize("name", PROGRAMS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_peak_of_any_cut_is_never_above_what_is_alive(name: str, data: st.DataObject) -> None:
    sizes = QUANTITIES[name].layout.sizes
    widths = data.draw(st.fixed_dictionaries({group: st.integers(1, size) for group, size in sizes.items()}))
    assert QUANTITIES[name].alive(widths) <= counted(name, widths)


def test_a_skip_connection_keeps_the_stream_alive_beside_the_branch() -> None:
    """By hand: dense, the stream and two results of the branch; narrowed, the input and what the stem makes of it."""
    skip = QUANTITIES["skip"]
    assert sorted(skip.layout.sizes.values()) == [12, 16, 40]
    assert skip.alive({}) == 36 * (12 + 2 * 40)
    narrow = {group: max(1, round(0.2 * size)) for group, size in skip.layout.sizes.items()}
    assert skip.alive(narrow) == 36 * (48 + 2)


def test_a_result_that_is_read_through_a_view_is_counted_once() -> None:
    """By hand: what three layers made, the first alive because its view is still to be read; views take nothing."""
    assert QUANTITIES["views"].alive({}) == 5 * (24 + 64 + 8)
