"""torch-pruning's global pruning, read as a plan for our layout."""

import pytest
import torch
from kiridashi_server.backbone import Backbone
from torch import Tensor, nn

from benchmarks.global_pruning import IMPORTANCES, global_plan


class Tiny(nn.Module):
    """A stem, an inverted residual block with a depthwise convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU())
        self.project = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.fc(x.mean(dim=(2, 3)))


@pytest.fixture
def tiny() -> tuple[nn.Module, Backbone]:
    torch.manual_seed(1)
    module = Tiny()
    with torch.no_grad():
        for name, value in module.state_dict().items():  # statistics that are not those of a new layer
            if name.endswith("running_mean"):
                value.copy_(0.2 * torch.randn_like(value))
            elif name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.1)
    module.eval()
    module(torch.randn(4, 3, 8, 8)).logsumexp(dim=1).sum().backward()
    return module, Backbone.from_module(module, torch.zeros(1, 3, 8, 8), name="tiny", head="fc")


@pytest.mark.parametrize("method", IMPORTANCES)
@pytest.mark.parametrize("ratio", [0.15, 0.3])
def test_the_plan_gives_the_pruned_module(tiny: tuple[nn.Module, Backbone], method: str, ratio: float) -> None:
    """Compared inside with the module that torch-pruning made: parameters, and outputs for random images."""
    module, backbone = tiny
    before = {name: value.clone() for name, value in module.state_dict().items()}

    plan = global_plan(module, backbone, method, ratio, multiple=4, head="fc")

    assert sum(plan.counts.values()) < sum(backbone.layout.sizes.values())
    assert all(count % 4 == 0 for count in plan.counts.values())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_module_that_is_not_the_backbones_is_noticed(tiny: tuple[nn.Module, Backbone]) -> None:
    module, backbone = tiny
    with torch.no_grad():
        module.get_parameter("project.weight").add_(0.1)

    with pytest.raises(ValueError, match="differs"):
        global_plan(module, backbone, "tp-magnitude", 0.5, multiple=4, head="fc")
