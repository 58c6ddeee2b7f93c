"""A classifier that is its own arithmetic: features are the mean of each channel."""

from __future__ import annotations

import pytest
import torch
from kiridashi_server.classifier import Classifier
from torch import fx, nn


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    features = fx.symbolic_trace(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    return Classifier(features, nn.Linear(3, 4))
