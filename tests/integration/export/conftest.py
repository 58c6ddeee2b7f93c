"""A small network with everything that makes locating parameters hard: zero biases, and two that are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kiridashi.manifest import Preprocessing
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.artifacts import ExportResult, export_artifacts
from kiridashi_server.graph.fold import fold_batch_norm
from kiridashi_server.graph.program import capture
from numpy.typing import NDArray
from torch import Tensor, nn

SIDE, CLASSES, WIDTH = 16, 5, 24
PREPROCESSING = Preprocessing(SIDE, SIDE, (0.5,) * 3, (0.25,) * 3)
EXAMPLE = torch.zeros(1, 3, SIDE, SIDE)
TUNABLE = ("features.mix.bias", "features.depthwise.bias", "features.expand.bias", "head.weight", "head.bias")


class Net(nn.Module):
    """Convolution and normalisation, then a depthwise block, then the mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 1)
        self.expand = nn.Conv2d(WIDTH, 2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = x + self.mix(nn.functional.relu6(self.depthwise(x)))
        return nn.functional.relu6(self.expand(x)).mean((2, 3))


def make_classifier() -> Classifier:
    torch.manual_seed(3)
    net = Net()
    with torch.no_grad():
        net.norm.bias.normal_()
        net.depthwise.bias.zero_()
        net.mix.bias.zero_()
        net.expand.bias.fill_(0.25)
    classifier = Classifier(fold_batch_norm(capture(net, EXAMPLE)), nn.Linear(2 * WIDTH, CLASSES))
    with torch.no_grad():
        classifier.head.weight.normal_(0, 2)
        classifier.head.bias.zero_()
    return classifier


def make_images() -> NDArray[np.uint8]:
    """Images of one colour each with a little noise: far enough apart for int8 to agree on the class."""
    rng = np.random.default_rng(0)
    colours = rng.integers(20, 236, (24, 1, 1, 3))
    return np.clip(colours + rng.integers(-20, 21, (24, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def tunable_of(classifier: Classifier) -> dict[str, NDArray[np.float32]]:
    parameters = dict(classifier.named_parameters())
    return {name: parameters[name].detach().numpy().copy() for name in TUNABLE}


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="session")
def images() -> NDArray[np.uint8]:
    return make_images()


@pytest.fixture(scope="session")
def tunable(classifier: Classifier) -> dict[str, NDArray[np.float32]]:
    return tunable_of(classifier)


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return PREPROCESSING


@pytest.fixture(scope="session")
def example() -> Tensor:
    return EXAMPLE


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """All five kinds of the small network, exported once."""
    classifier = make_classifier()
    folder = tmp_path_factory.mktemp("export") / "all"
    return export_artifacts(classifier, EXAMPLE, make_images(), PREPROCESSING, tunable_of(classifier), folder)
