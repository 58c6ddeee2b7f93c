"""A tiny backbone, a tiny task and hand-made records for the tests of scores, bank and recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Kind, Policy, Provenance, Record
from kiridashi_server.budget import Profile
from kiridashi_server.dinov2 import Shape, VisionTransformer
from kiridashi_server.tasks import Samples, Task
from torch import Tensor, nn
from torch.nn import functional

SIDE = 16
CLASSES = 3


class TinyNet(nn.Module):
    """Stem, an inverted residual with depthwise convolution, a head convolution, pooled features [N, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 48, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(48)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(48)
        self.project = nn.Conv2d(48, 16, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(16)
        self.top = nn.Conv2d(16, 32, 1, bias=False)
        self.top_norm = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem_norm(self.stem(x)))
        y = functional.relu6(self.expand_norm(self.expand(x)))
        y = functional.relu6(self.depthwise_norm(self.depthwise(y)), inplace=True)
        x = x + self.project_norm(self.project(y))
        return functional.relu6(self.top_norm(self.top(x))).mean((2, 3))


def tiny_net() -> TinyNet:
    """The net with fixed random weights and the statistics of random images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = TinyNet()
        net.train()
        with torch.no_grad():
            for _ in range(60):
                net(torch.rand(16, 3, SIDE, SIDE))
    return net.eval()


def tiny_backbone() -> Backbone:
    """``tiny_net`` as a backbone for images of 16 x 16 pixels."""
    return Backbone.from_module(tiny_net(), torch.zeros(1, 3, SIDE, SIDE), name="tiny")


def tiny_vit() -> VisionTransformer:
    """Two blocks of three heads of 8 and an MLP of 96, LayerScale included, with fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        net = VisionTransformer(Shape(width=24, hidden=96, heads=3, blocks=2, patch=4, grid=4))
        with torch.no_grad():
            for name, tensor in net.named_parameters():
                if ".scale" in name:
                    tensor.uniform_(0.2, 2.0)
                elif tensor.dim() == 2:
                    tensor.mul_(2)  # attention and MLP that are anything but linear
                elif name in ("start", "position"):
                    tensor.normal_()
    return net.eval()


def tiny_vit_backbone(net: VisionTransformer | None = None) -> Backbone:
    """``tiny_vit``, or a net like it, as a backbone for images of 16 x 16 pixels."""
    return Backbone.from_module(net or tiny_vit(), torch.zeros(1, 3, SIDE, SIDE), name="tiny-vit")


def tiny_samples(per_class: int, seed: int) -> Samples:
    """Noisy images of one of three hues; the views of a class all differ."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int64), per_class)
    base = np.full((CLASSES, 3), 90.0) + 40.0 * np.eye(CLASSES)
    noise = generator.normal(0, 30, (len(labels), SIDE, SIDE, 3))
    images = np.clip(base[labels][:, None, None, :] + noise, 0, 255).astype(np.uint8)
    return Samples(images, labels, tuple(f"{seed}-{index}" for index in range(len(labels))))


def tiny_task(name: str = "hues", seed: int = 0) -> Task:
    """``tiny_samples`` as a task with the splits train, val and test."""
    splits = {"train": tiny_samples(8, seed), "val": tiny_samples(4, seed + 1), "test": tiny_samples(20, seed + 2)}
    return Task(name, ("red", "green", "blue"), splits)


def make_record(
    task: str = "hues",
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    head: np.ndarray | None = None,
    fingerprint: str = "backbone",
    layout: str = "layout",
    created: str = "2026-01-01T00:00:00+00:00",
    seconds: float = 1.0,
    headless: bool = False,
    kind: Kind = "learnt",
    policy: Policy = "internal",
) -> Record:
    """A record with small made-up contents; a headless one has no feature moments either."""
    weight = np.eye(3, 4, dtype=np.float32) if head is None else head.astype(np.float32)
    classes, width = weight.shape
    return Record(
        task=task,
        labels=tuple(f"class {index}" for index in range(classes)),
        backbone_fingerprint=fingerprint,
        layout_digest=layout,
        samples=24,
        scores=scores or {"a": np.arange(4, dtype=np.float32), "b": np.ones(6, dtype=np.float32)},
        head_weight=None if headless else weight,
        head_bias=None if headless else np.zeros(classes, dtype=np.float32),
        feature_mean=None if headless else np.zeros(width, dtype=np.float32),
        feature_variance=None if headless else np.ones(width, dtype=np.float32),
        provenance=Provenance(
            seed=0, settings={"iterations": 40}, code_version="1", task_digest=f"sha256:{task}", seconds=seconds
        ),
        created=created,
        outcomes={"dense": 0.5},
        kind=kind,
        policy=policy,
    )


def made_up_profile(backbone: Backbone, **changed: Any) -> Profile:
    """A profile of a device that does not exist, with prices that are easy to reckon with."""
    profile = Profile(
        device_class="far-away",
        hardware="real",
        runtime_name="onnxruntime",
        runtime="onnxruntime 1",
        threads=1,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        macs=backbone.costs.macs({}),
        points=(),
        block=8,
        multiple=8,
        block_errors={},
        cliffs={},
        memory={"fixed": 50e6, "parameters": 8.0},
        file={"fixed": 2_000.0, "parameters": 4.0},
        latency={"fixed": 0.01, "weights": 1e-7, "dense": 1e-8},
        tail=1.2,
        noise=0.0,
        error={"memory": 0.0, "file": 0.0, "latency": 0.05},
    )
    return msgspec.structs.replace(profile, **changed)
