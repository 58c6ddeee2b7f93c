"""Two cuts, one after the other, leave the very program that one cut leaves: names, tensors and output."""

import numpy as np
import pytest
import torch
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import capture, tensor_names, tensor_of
from kiridashi_server.graph.tracker import track
from torch import Tensor, nn


class Shifted(nn.Module):
    """Channels to which a constant of the code is added, a different one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.arange(16.0).reshape(1, 16, 1, 1)
        return self.second(self.first(x) + shift).mean((2, 3))


class Plain(nn.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.second = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).mean((2, 3))


@pytest.mark.parametrize("network", [Plain, Shifted])
@pytest.mark.parametrize("seed", range(3))
def test_two_cuts_leave_what_one_leaves(network, seed):
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        program = capture(network().eval(), torch.zeros(1, 3, 4, 4))
    tracking = track(program)
    (group,) = tracking.layout.groups
    outer = np.sort(rng.permutation(group.size)[:10])
    inner = np.sort(rng.permutation(10)[:4])
    once = cut(program, tracking, Plan.of(tracking.layout, {group.name: outer[inner].tolist()}))
    first = cut(program, tracking, Plan.of(tracking.layout, {group.name: outer.tolist()}))
    again = track(first)
    twice = cut(first, again, Plan.of(again.layout, {group.name: inner.tolist()}))
    assert tensor_names(twice) == tensor_names(once)
    assert all(torch.equal(tensor_of(twice, name), tensor_of(once, name)) for name in tensor_names(once))
    x = torch.from_numpy(rng.normal(size=(2, 3, 4, 4)).astype(np.float32))
    assert torch.equal(twice(x), once(x))
