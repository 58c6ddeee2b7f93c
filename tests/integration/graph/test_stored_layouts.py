"""Layouts and fingerprints are those that were stored once, under whatever torch version the tests run.

Stored scores, plans and records name groups and carry these digests: a change here makes them unusable. It needs a
migration, not a new file. Run as a program, this module writes the files anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from kiridashi_server.backbone import Backbone
from kiridashi_server.graph import Layout, capture, track
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "layouts"


class Outputs(nn.Module):
    """A model of transformers that gives the named outputs."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.model(x)
        return tuple(getattr(result, name) for name in self.names)


def cnn() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], layer_type="bottleneck", num_labels=5
    )
    return Outputs(transformers.ResNetForImageClassification(config), "logits")


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=64,
        patch_size=16,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        num_labels=5,
    )
    return Outputs(transformers.ViTForImageClassification(config), "logits")


def detector() -> nn.Module:
    """Convolutions, a hybrid encoder, a pyramid, deformable attention, chosen queries, two outputs."""
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=24,
        d_model=16,
        num_queries=6,
        decoder_in_channels=[16, 16, 16],
        decoder_layers=1,
        decoder_ffn_dim=24,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        num_labels=5,
    )
    return Outputs(transformers.RTDetrForObjectDetection(config), "logits", "pred_boxes")


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "vit": vit, "detector": detector}


def layouts(name: str) -> dict[str, Layout]:
    """The layout with normalised units frozen, and with them cut."""
    program = capture(MODELS[name]().eval(), torch.zeros(1, 3, 64, 64), dynamic_batch=name != "detector")
    return {
        way: track(program, cut_normalised=normalised).layout
        for way, normalised in (("default", False), ("normalised", True))
    }


def fingerprint(name: str) -> str:
    """Of the model as a backbone, with weights that no random generator makes."""
    model = MODELS[name]().model
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            values = (np.arange(tensor.numel()) % 17 + 1) / 17
            tensor.copy_(torch.from_numpy(values).reshape(tensor.shape))
    head = {"cnn": "model.classifier.1", "vit": "model.classifier"}[name]
    return Backbone.from_module(First(model), torch.zeros(1, 3, 64, 64), name=name, head=head).fingerprint


class First(Outputs):
    """The logits alone, as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "logits")

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def stored(name: str) -> dict[str, str]:
    content: dict[str, str] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", MODELS)
def test_names_order_members_and_reasons_are_those_stored(name: str) -> None:
    for way, layout in layouts(name).items():
        expected = Layout.from_json(stored(name)[way])
        assert layout.groups == expected.groups, way
        assert layout.frozen == expected.frozen, way
        assert layout.digest == stored(name)[f"{way}_digest"]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_fingerprints_are_those_stored(name: str) -> None:
    assert fingerprint(name) == stored(name)["fingerprint"]


@pytest.mark.parametrize("name", MODELS)
def test_another_name_or_order_would_be_noticed(name: str) -> None:
    layout = Layout.from_json(stored(name)["default"])
    assert layout.digest == stored(name)["default_digest"]
    for old, new in ((layout.groups[0].name, "other"), (layout.groups[-1].members[0].parameter, "other.weight")):
        text = stored(name)["default"].replace(f'"{old}"', f'"{new}"')
        assert Layout.from_json(text).digest != layout.digest
    assert Layout(layout.groups[::-1], layout.frozen).groups != layout.groups


def main() -> None:
    """Write what the models give now."""
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        content = {}
        for way, layout in layouts(name).items():
            content |= {way: layout.to_json(), f"{way}_digest": layout.digest}
        if name != "detector":
            content["fingerprint"] = fingerprint(name)
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
