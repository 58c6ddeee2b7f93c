"""What is traced: padding taken into convolutions, and no gradient below the lowest trained parameter."""

from collections import Counter

import pytest
import torch
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.train_step_trace import StepSettings, fold_padding, trace_step
from kiridashi_server.graph.program import capture, operator_name
from torch import Tensor, fx, nn


class _Padded(nn.Module):
    """A convolution behind a padding."""

    def __init__(self, amounts: tuple[int, int, int, int], value: float = 0.0, mode: str = "constant") -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.amounts, self.value, self.mode = amounts, value, mode

    def forward(self, x: Tensor) -> Tensor:
        value = self.value if self.mode == "constant" else None
        result: Tensor = self.layer(nn.functional.pad(x, self.amounts, mode=self.mode, value=value))
        return result


def _operators(program: fx.GraphModule) -> Counter[str]:
    return Counter(operator_name(node) for node in program.graph.nodes if node.op == "call_function")


def test_even_zero_padding_goes_into_the_convolution() -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    program = capture(_Padded((2, 2, 1, 1)), x)
    folded = fold_padding(program)
    assert "pad" not in _operators(folded)
    assert "pad" in _operators(program)
    torch.testing.assert_close(folded(x), program(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        _Padded((0, 1, 0, 1)),
        _Padded((1, 1, 1, 1), value=2.0),
        _Padded((1, 1, 1, 1), mode="reflect"),
        _Padded((-1, -1, -1, -1)),
    ],
    ids=["uneven", "not zero", "reflect", "cropping"],
)
def test_other_padding_stays(module: nn.Module) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    program = capture(module, x)
    folded = fold_padding(program)
    assert _operators(folded) == _operators(program)
    assert torch.equal(folded(x), program(x))


def _chain() -> Classifier:
    torch.manual_seed(0)
    layers = nn.Sequential(
        *[part for _ in range(4) for part in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU6())],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Classifier(capture(layers, torch.zeros(1, 3, 6, 6)), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("lowest", "backward"), [(None, 0), ("features.6.bias", 1), ("features.2.bias", 3), ("features.0.weight", 4)]
)
def test_nothing_below_the_lowest_trained_parameter_is_differentiated(lowest: str | None, backward: int) -> None:
    names = ("head.weight",) if lowest is None else (lowest, "head.weight")
    step = trace_step(_chain(), StepSettings((3, 6, 6), names, 2, 1.0, 0.9))
    assert _operators(step.program)["convolution_backward"] == backward


def test_tracing_leaves_the_model_alone() -> None:
    model = _chain()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    trace_step(model, StepSettings((3, 6, 6), ("features.6.bias",), 2, 1.0, 0.9))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None


def test_tracing_works_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        step = trace_step(_chain(), StepSettings((3, 6, 6), ("features.6.bias",), 2, 1.0, 0.9))
    assert _operators(step.program)["convolution_backward"] == 1


def test_a_parameter_without_influence_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x).detach().mean((2, 3)) + x.mean((2, 3))
            return result

    model = Classifier(capture(Detached(), torch.zeros(1, 3, 4, 4)), nn.Linear(3, 2))
    with pytest.raises(ExportError, match="cannot be traced"):
        trace_step(model, StepSettings((3, 4, 4), ("features.layer.bias",), 2, 1.0, 0.9))
