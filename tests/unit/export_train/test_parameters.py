"""Which parameters are trained: the last layers' biases in the order in which they run, then the head."""

import pytest
import torch
from kiridashi.errors import InputError
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.train_step_parameters import HEAD_PARAMETERS, bias_head_parameters
from kiridashi_server.graph.program import capture
from torch import Tensor, nn


class _Layers(nn.Module):
    """Eight layers that run in another order than they are declared; the sixth to run has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.seventh = nn.Linear(4, 4)
        self.sixth = nn.Linear(4, 4, bias=False)
        self.first = nn.Conv2d(3, 4, 1)
        self.others = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        flat = self.others(self.first(x)).mean((2, 3))
        result: Tensor = self.last(self.seventh(self.sixth(flat)))
        return result


@pytest.fixture(scope="module")
def model() -> Classifier:
    return Classifier(capture(_Layers(), torch.zeros(1, 3, 4, 4)), nn.Linear(4, 2))


def test_default_is_the_last_quarter_in_running_order(model: Classifier) -> None:
    assert bias_head_parameters(model) == ("features.seventh.bias", "features.last.bias", *HEAD_PARAMETERS)


def test_a_layer_without_bias_counts_but_gives_none(model: Classifier) -> None:
    assert bias_head_parameters(model, 3 / 8) == bias_head_parameters(model, 2 / 8)
    assert bias_head_parameters(model, 4 / 8)[0] == "features.others.3.bias"


def test_share_is_rounded_up(model: Classifier) -> None:
    assert len(bias_head_parameters(model, 0.01)) == 1 + len(HEAD_PARAMETERS)


def test_nothing_and_everything(model: Classifier) -> None:
    assert bias_head_parameters(model, 0.0) == HEAD_PARAMETERS
    every = bias_head_parameters(model, 1.0)
    assert set(every) == {n for n, _ in model.named_parameters() if n.endswith("bias")} | {"head.weight"}


def test_names_are_the_models_own(model: Classifier) -> None:
    known = dict(model.named_parameters())
    assert all(name in known for name in bias_head_parameters(model, 1.0))


def test_a_shared_bias_is_named_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(self.layer(x)).mean((2, 3))
            return result

    model = Classifier(capture(Twice(), torch.zeros(1, 3, 4, 4)), nn.Linear(3, 2))
    assert bias_head_parameters(model, 1.0) == ("features.layer.bias", *HEAD_PARAMETERS)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(model: Classifier, share: float) -> None:
    with pytest.raises(InputError, match="share"):
        bias_head_parameters(model, share)
