"""The contract of the graph, as a device relies on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kiridashi.errors import InputError
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.train_step import export_train_step
from kiridashi_server.export.train_step_parameters import HEAD_PARAMETERS, bias_head_parameters
from numpy.typing import NDArray

NO_CLIPPING = 1e9


@pytest.fixture
def batch() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 3, 16, 16)).astype(np.float32)
    return x, np.eye(4, dtype=np.float32)[rng.integers(4, size=6)]


def _write(model: Classifier, folder: Path, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    given = {"example_shape": (3, 16, 16), "parameters": bias_head_parameters(model, 0.5), "batch": 6, **changes}
    export_train_step(model, **given, path_graph=folder / "step.onnx", path_state=folder / "state.npz")


def test_inputs_outputs_and_state_are_what_the_manifest_says(tiny: Classifier, tmp_path: Path) -> None:
    names = bias_head_parameters(tiny, 0.5)
    _write(tiny, tmp_path)
    graph = onnx.load(tmp_path / "step.onnx")
    onnx.checker.check_model(graph, full_check=True)
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.graph.input}
    known = {name: tuple(value.shape) for name, value in tiny.named_parameters() if name in names}
    momenta = {f"momentum.{name}": shape for name, shape in known.items()}
    assert shapes == {"x": (6, 3, 16, 16), "y": (6, 4), "lr": (), **known, **momenta}
    expected = ["loss", *(f"new.{name}" for name in names), *(f"new.momentum.{name}" for name in names)]
    assert [value.name for value in graph.graph.output] == [*expected, "gradient_norm"]
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        assert set(state.files) == set(names)
        for name, value in tiny.named_parameters():
            if name in names:
                np.testing.assert_array_equal(state[name], value.detach().numpy())


def test_frozen_weights_are_initialisers_and_trained_ones_are_not(tiny: Classifier, tmp_path: Path) -> None:
    _write(tiny, tmp_path)
    stored = {value.name for value in onnx.load(tmp_path / "step.onnx").graph.initializer}
    trained = set(bias_head_parameters(tiny, 0.5))
    assert {name for name, _ in tiny.named_parameters()} - trained <= stored
    assert not trained & stored


def test_same_model_same_bytes(tiny: Classifier, tmp_path: Path) -> None:
    _write(tiny, tmp_path / "a")
    _write(tiny, tmp_path / "b")
    for name in ("step.onnx", "state.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a" / "step.onnx").read_bytes()


def test_ten_steps_are_torchs_ten_steps(
    tiny: Classifier, export: Callable[..., Any], batch: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    names = bias_head_parameters(tiny, 1.0)
    stepper = export(tiny, names, 6, clip_norm=NO_CLIPPING)
    x, y = batch
    twin = Classifier.with_zero_head(tiny.features, tiny.head.in_features, 4)
    twin.head.load_state_dict(tiny.head.state_dict())
    known = dict(twin.named_parameters())
    optimiser = torch.optim.SGD([known[name] for name in names], lr=0.05, momentum=0.9)
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(twin(torch.from_numpy(x)), torch.from_numpy(y).argmax(1))
        assert stepper.step(x, y, 0.05) == pytest.approx(float(loss.detach()), abs=2e-6)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for name in names:
        np.testing.assert_allclose(stepper.values[name], known[name].detach().numpy(), atol=2e-6)


def test_gradients_are_clipped_together_to_the_given_norm(
    tiny: Classifier, export: Callable[..., Any], batch: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    names = bias_head_parameters(tiny, 1.0)

    def update(clip_norm: float) -> tuple[float, NDArray[np.float32]]:
        stepper = export(tiny, names, 6, clip_norm=clip_norm)
        stepper.step(*batch, 0.1)
        return stepper.norm, np.concatenate([stepper.momenta[name].ravel() for name in names])

    norm, whole = update(NO_CLIPPING)
    assert np.linalg.norm(whole) == pytest.approx(norm, rel=1e-5)
    again, clipped = update(norm / 4)
    assert again == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(clipped, whole / 4, rtol=1e-4, atol=1e-7)


def test_no_step_is_longer_than_rate_times_clip_norm(
    tiny: Classifier, export: Callable[..., Any], batch: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    names = bias_head_parameters(tiny, 1.0)
    stepper = export(tiny, names, 6, clip_norm=0.01)
    before = stepper.values
    stepper.step(*batch, 0.5)
    assert stepper.norm > 0.01
    moved = np.concatenate([(stepper.values[name] - before[name]).ravel() for name in names])
    assert np.linalg.norm(moved) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_a_row_of_zeros_is_padding(
    tiny: Classifier, export: Callable[..., Any], batch: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    x, y = batch
    names = bias_head_parameters(tiny, 1.0)
    padded, short = export(tiny, names, 6), export(tiny, names, 4)
    y[4:] = 0.0
    for _ in range(3):
        assert padded.step(x, y, 0.1) == pytest.approx(short.step(x[:4], y[:4], 0.1), abs=1e-6)
    for name in names:
        np.testing.assert_allclose(padded.values[name], short.values[name], atol=1e-6)


def test_a_row_twice_as_heavy_counts_as_two_samples(
    tiny: Classifier, export: Callable[..., Any], batch: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    x, y = batch
    names = bias_head_parameters(tiny, 1.0)
    heavy, twice = export(tiny, names, 5), export(tiny, names, 6)
    x[5], y[5] = x[0], y[0]
    weights = np.array([[2.0], [1.0], [1.0], [1.0], [1.0]], np.float32)
    assert heavy.step(x[:5], y[:5] * weights, 0.1) == pytest.approx(twice.step(x, y, 0.1), abs=1e-6)
    for name in names:
        np.testing.assert_allclose(heavy.values[name], twice.values[name], atol=1e-6)


def test_a_batch_of_padding_alone_changes_nothing(
    tiny: Classifier, export: Callable[..., Any], batch: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> None:
    stepper = export(tiny, bias_head_parameters(tiny, 1.0), 6)
    before = dict(stepper.values)
    assert stepper.step(batch[0], np.zeros_like(batch[1]), 0.1) == 0.0
    for name, value in before.items():
        np.testing.assert_array_equal(stepper.values[name], value)


@pytest.mark.parametrize(
    "names",
    [HEAD_PARAMETERS, ("features.3.0.weight", "head.bias"), None],
    ids=["head alone", "a weight inside", "all"],
)
def test_any_parameters_may_be_trained(
    tiny: Classifier, export: Callable[..., Any], names: tuple[str, ...] | None
) -> None:
    chosen = names or tuple(name for name, _ in tiny.named_parameters())
    stepper = export(tiny, chosen, 6)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((6, 3, 16, 16)).astype(np.float32), np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
    losses = [stepper.step(x, y, 0.1) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": ()},
        {"parameters": ("head.bias", "head.bias")},
        {"parameters": ("head.bias", "features.no.such")},
        {"batch": 0},
        {"example_shape": (3, 0, 16)},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"momentum": 1.0},
    ],
    ids=str,
)
def test_bad_input_is_refused_and_nothing_is_written(tiny: Classifier, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        _write(tiny, tmp_path, **changes)
    assert caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_double_precision_is_refused(tiny: Classifier, tmp_path: Path) -> None:
    model = Classifier.with_zero_head(tiny.features, tiny.head.in_features, 4).double()
    with pytest.raises(InputError, match="float64"):
        _write(model, tmp_path)
