"""Capture: what a program keeps of its model, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from kiridashi.errors import ExitCode
from kiridashi_server.graph import GraphError, capture
from kiridashi_server.graph.program import operator_name, set_tensor, tensor_names, tensor_of, weight_names
from torch import Tensor, nn


def test_the_program_computes_what_the_model_computes(make_model: Callable[[str], nn.Module], images: Tensor) -> None:
    for name in ("residual", "branches", "attention"):
        model = make_model(name)
        program = capture(model, images[:1])
        for batch in (images, images[:1]):
            torch.testing.assert_close(program(batch), model(batch), rtol=0, atol=1e-14)


def test_names_are_kept_and_the_model_is_left_alone(make_model: Callable[[str], nn.Module], images: Tensor) -> None:
    model = make_model("residual").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = capture(model, images)
    assert dict(program.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        tensor_of(program, "head.weight").zero_()
    assert model.state_dict()["head.weight"].abs().sum() > 0


def test_a_fixed_batch_is_fixed(make_model: Callable[[str], nn.Module], images: Tensor) -> None:
    program = capture(make_model("attention"), images[:1], dynamic_batch=False)
    assert program(images[:1]).shape == (1, 4)
    with pytest.raises(RuntimeError):
        program(images)


def test_equal_splits_name_their_sizes(make_model: Callable[[str], nn.Module], images: Tensor) -> None:
    operators = {operator_name(node) for node in capture(make_model("branches"), images).graph.nodes}
    assert "split_with_sizes" in operators
    assert "chunk" not in operators


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x * 2}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


@pytest.mark.parametrize(
    ("module", "words"),
    [(Dictionary(), "returns a dict"), (Branching(), "cannot be exported")],
)
def test_what_cannot_be_a_program_is_refused(module: nn.Module, words: str, images: Tensor) -> None:
    with pytest.raises(GraphError, match=words) as caught:
        capture(module, images)
    assert caught.value.next_step
    assert caught.value.exit_code is ExitCode.MODEL


def test_an_empty_example_is_refused(images: Tensor) -> None:
    with pytest.raises(GraphError, match="example input has shape"):
        capture(nn.Identity(), images[:0])


def test_no_example_is_refused() -> None:
    with pytest.raises(GraphError, match="example input has shape"):
        capture(nn.Identity(), ())


class Reserved(nn.Module):
    """A child whose name the exporter needs for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)


def test_what_the_exporter_cannot_name_is_refused(images: Tensor) -> None:
    with pytest.raises(GraphError, match="cannot be exported"):
        capture(Reserved().double(), images)


def test_an_example_that_is_no_tensor_is_refused(images: Tensor) -> None:
    with pytest.raises(GraphError, match="hold a list"):
        capture(Pair(), [images, [images]])  # type: ignore[list-item]


def test_a_model_that_keeps_results_is_refused_until_they_are_plain(images: Tensor) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept[:] = self.kept or [self.layer.weight * 2]
            return self.layer(x) * self.kept[0].sum()

    model = Keeping().double()
    model(images)
    with pytest.raises(GraphError, match="cannot be copied"):
        capture(model, images)


def test_constants_of_the_code_are_no_weights(images: Tensor) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)

    program = capture(nn.Sequential(nn.Conv2d(3, 3, 1), Shifted()).double(), images)
    assert len(tensor_names(program)) == 3
    assert set(weight_names(program)) == {"0.weight", "0.bias"}


def test_a_pair_of_tensors_is_given_as_a_tuple(images: Tensor) -> None:
    first, second = capture(Pair(), images)(images)
    assert torch.equal(first, images + 1)
    assert torch.equal(second, images * 2)


def test_unused_tensors_are_left_out(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double().eval()
    assert "1.num_batches_tracked" not in tensor_names(capture(model, images))


def test_tensors_are_found_and_set_by_name(make_model: Callable[[str], nn.Module], images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    set_tensor(program, "stem.bias", nn.Parameter(torch.ones(8)))
    assert isinstance(tensor_of(program, "stem.bias"), nn.Parameter)
    with pytest.raises(GraphError, match="no tensor called 'stem"):
        tensor_of(program, "stem.nothing")
