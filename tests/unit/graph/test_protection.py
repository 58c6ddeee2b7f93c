"""Layers that the user wants left alone."""

from collections.abc import Callable

import pytest
import torch
from kiridashi_server.graph import GraphError, Plan, capture, cut, track
from torch import Tensor, nn

Make = Callable[[str], nn.Module]


@pytest.mark.parametrize(
    ("protect", "groups"),
    [
        ([], {"stem", "expand", "squeeze"}),
        (["squeeze"], {"stem"}),  # its inputs are the expanded channels
        (["squeeze.bias"], {"stem", "expand"}),
        (["*norm"], {"squeeze"}),
        (["head", "excite.weight"], set()),
        (["project_norm.*"], {"expand", "squeeze"}),
    ],
)
def test_protected_layers_stay_whole(protect: list[str], groups: set[str], make_model: Make, images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    tracking = track(program, protect=protect)
    assert set(tracking.layout.sizes) == groups
    frozen = {axis.parameter: axis.reason for axis in tracking.layout.frozen}
    assert ("protected" in frozen.values()) == bool(protect)
    small = cut(program, tracking, Plan.of(tracking.layout, {name: [0] for name in groups}))
    for name, parameter in program.named_parameters():
        if frozen.get(name) == "protected" and any(name.startswith(pattern.strip("*.")) for pattern in protect):
            assert torch.equal(small.get_parameter(name), parameter)


def test_a_name_that_nothing_has_is_refused(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    with pytest.raises(GraphError, match="'steem'") as caught:
        track(program, protect=["stem", "steem"])
    assert caught.value.next_step


def test_a_shared_module_is_protected_wherever_it_is_called(images: Tensor) -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sigmoid(), shared, nn.Conv2d(4, 2, 1)).double()
    program = capture(model, images)
    assert set(track(program).layout.sizes) == {"0"}
    (name,) = {name.partition(".")[0] for name in track(program).tensors} & {"1", "3"}  # the exporter keeps one
    assert set(track(program, protect=[name]).layout.sizes) == set()
