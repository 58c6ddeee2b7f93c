"""A task's model: the shared feature extractor, cut or not, and a linear head of the task's own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """``logits = head(features(x))``; x float32 [N, 3, H, W], features [N, D], logits [N, classes].

    Args:
        features: an exported program, used as it is (not copied).
        head: the linear head; its input width is D.
    """

    def __init__(self, features: torch.fx.GraphModule, head: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.head = head

    @classmethod
    def with_zero_head(cls, features: torch.fx.GraphModule, width: int, classes: int) -> Classifier:
        """A classifier over a copy of ``features`` whose head is all zero."""
        head = nn.Linear(width, classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(copy.deepcopy(features), head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 [N, classes]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, classes] and features [N, D]."""
        features: Tensor = self.features(images)
        return self.head(features), features
