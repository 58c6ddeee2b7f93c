"""Classifiers, convolutional and with attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from benchmarks.zoo.entry import RESNET, SIDE, SWIN, TRANSFORMER, Entry, model_of


def _lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    model._dropout = nn.Identity()
    module: nn.Module = model
    return module


CLASSIFICATION: Mapping[str, Entry] = {
    "efficientnet-lite0": Entry("classification", _lite0, package="efficientnet-lite-pytorch"),
    "resnet": Entry("classification", model_of("ResNetForImageClassification", "ResNetConfig", **RESNET, num_labels=5)),
    "bit": Entry(
        "classification",
        model_of("BitForImageClassification", "BitConfig", **RESNET, num_groups=4, num_labels=5),
    ),
    "mobilenet-v1": Entry(
        "classification",
        model_of(
            "MobileNetV1ForImageClassification",
            "MobileNetV1Config",
            depth_multiplier=0.25,
            image_size=SIDE,
            num_labels=5,
        ),
    ),
    "mobilenet-v2": Entry(
        "classification",
        model_of(
            "MobileNetV2ForImageClassification",
            "MobileNetV2Config",
            depth_multiplier=0.35,
            image_size=SIDE,
            num_labels=5,
        ),
    ),
    "efficientnet": Entry(
        "classification",
        model_of(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            image_size=SIDE,
            width_coefficient=0.25,
            depth_coefficient=0.25,
            hidden_dim=320,
            num_labels=5,
        ),
    ),
    "regnet": Entry(
        "classification",
        model_of(
            "RegNetForImageClassification",
            "RegNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32, 48],
            depths=[1, 2, 1],
            groups_width=8,
            num_labels=5,
        ),
    ),
    "convnext": Entry(
        "classification",
        model_of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 2, 1],
            num_labels=5,
        ),
    ),
    "convnext-v2": Entry(
        "classification",
        model_of(
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 2, 1],
            num_labels=5,
        ),
    ),
    "poolformer": Entry(
        "classification",
        model_of(
            "PoolFormerForImageClassification",
            "PoolFormerConfig",
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 1, 1],
            num_labels=5,
        ),
    ),
    "levit": Entry(
        "classification",
        model_of(
            "LevitForImageClassification",
            "LevitConfig",
            image_size=SIDE,
            hidden_sizes=[32, 48, 64],
            num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            num_labels=5,
        ),
    ),
    "mobilevit": Entry(
        "classification",
        model_of(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            image_size=SIDE,
            hidden_sizes=[24, 32, 40],
            neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64],
            num_labels=5,
        ),
    ),
    "mobilevit-v2": Entry(
        "classification",
        model_of(
            "MobileViTV2ForImageClassification",
            "MobileViTV2Config",
            image_size=SIDE,
            width_multiplier=0.25,
            base_attn_unit_dims=[32, 48, 64],
            num_labels=5,
        ),
    ),
    "swiftformer": Entry(
        "classification",
        model_of(
            "SwiftFormerForImageClassification",
            "SwiftFormerConfig",
            image_size=SIDE,
            depths=[1, 1, 1, 1],
            embed_dims=[16, 24, 32, 48],
            num_labels=5,
        ),
    ),
    "vit": Entry("classification", model_of("ViTForImageClassification", "ViTConfig", **TRANSFORMER, num_labels=5)),
    "vit-eager": Entry(
        "classification",
        model_of("ViTForImageClassification", "ViTConfig", **TRANSFORMER, num_labels=5, attn_implementation="eager"),
    ),
    "deit": Entry("classification", model_of("DeiTForImageClassification", "DeiTConfig", **TRANSFORMER, num_labels=5)),
    "beit": Entry(
        "classification",
        model_of(
            "BeitForImageClassification", "BeitConfig", **TRANSFORMER, use_relative_position_bias=True, num_labels=5
        ),
    ),
    "dinov2": Entry(
        "classification",
        model_of(
            "Dinov2ForImageClassification",
            "Dinov2Config",
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=SIDE,
            patch_size=16,
            use_swiglu_ffn=True,
            num_labels=5,
        ),
    ),
    "swin": Entry("classification", model_of("SwinForImageClassification", "SwinConfig", **SWIN, num_labels=5)),
    "swin-v2": Entry("classification", model_of("Swinv2ForImageClassification", "Swinv2Config", **SWIN, num_labels=5)),
    "pvt": Entry(
        "classification",
        model_of(
            "PvtForImageClassification",
            "PvtConfig",
            image_size=SIDE,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 24, 32, 48],
            num_attention_heads=[1, 2, 2, 4],
            num_labels=5,
        ),
    ),
    "pvt-v2": Entry(
        "classification",
        model_of(
            "PvtV2ForImageClassification",
            "PvtV2Config",
            image_size=SIDE,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 24, 32, 48],
            num_attention_heads=[1, 2, 2, 4],
            num_labels=5,
        ),
    ),
    "cvt": Entry(
        "classification",
        model_of(
            "CvtForImageClassification",
            "CvtConfig",
            embed_dim=[16, 32, 48],
            num_heads=[1, 2, 3],
            depth=[1, 2, 3],
            num_labels=5,
        ),
    ),
    "focalnet": Entry(
        "classification",
        model_of(
            "FocalNetForImageClassification",
            "FocalNetConfig",
            image_size=SIDE,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_labels=5,
        ),
    ),
    "hiera": Entry(
        "classification",
        model_of(
            "HieraForImageClassification",
            "HieraConfig",
            image_size=[SIDE, SIDE],
            embed_dim=16,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 4, 8],
            num_labels=5,
        ),
    ),
    "textnet": Entry(
        "classification",
        model_of(
            "TextNetForImageClassification",
            "TextNetConfig",
            image_size=[SIDE, SIDE],
            stem_out_channels=16,
            hidden_sizes=[16, 16, 24, 32, 48],
            num_labels=5,
        ),
    ),
}
