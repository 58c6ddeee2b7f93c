"""Architectures that this project did not write, in small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Job: TypeAlias = Literal["classification", "detection", "segmentation", "depth", "features", "matching", "upscaling"]

_SIDE = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture.

    Attributes:
        job: what it is used for.
        make: builds it in float32, from torch's global generator; gives tensors, not a library's objects.
        side: of its square input images, in pixels.
        words: length of the token sequence that is its first input, or 0.
    """

    job: Job
    make: Callable[[], nn.Module]
    side: int = _SIDE
    words: int = 0

    def inputs(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random inputs [batch, ...] in float32, token numbers int64."""
        images = torch.randn(batch, 3, self.side, self.side, generator=generator)
        if not self.words:
            return (images,)
        return torch.randint(1, 50, (batch, self.words), generator=generator), images


class Outputs(nn.Module):
    """A model of transformers as a module that takes tensors by place and gives the named outputs."""

    def __init__(self, model: nn.Module, *names: str, takes: tuple[str, ...] = ("pixel_values",)) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.takes = takes

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.takes, inputs, strict=True))
        result = self.model(**given)
        values = tuple(getattr(result, name) for name in self.names)
        return values if len(values) > 1 else values[0]


def _model(
    class_name: str,
    config_name: str,
    *outputs: str,
    takes: tuple[str, ...] = ("pixel_values",),
    **settings: Any,
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made = {key: value() if callable(value) else value for key, value in settings.items()}
        config = getattr(transformers, config_name)(**made)
        return Outputs(getattr(transformers, class_name)(config), *(outputs or ("logits",)), takes=takes)

    return make


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**settings)

    return make


_TRANSFORMER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": _SIDE,
    "patch_size": 16,
}
_SWIN = {"image_size": _SIDE, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 10,
    "num_labels": 5,
}
_NO_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
_BOXES = ("logits", "pred_boxes")


def _lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=_SIDE)
    model._dropout = nn.Identity()
    module: nn.Module = model
    return module


ZOO: Mapping[str, Entry] = {
    "efficientnet-lite0": Entry("classification", _lite0),
    "resnet": Entry("classification", _model("ResNetForImageClassification", "ResNetConfig", **_RESNET, num_labels=5)),
    "bit": Entry(
        "classification",
        _model("BitForImageClassification", "BitConfig", **_RESNET, num_groups=4, num_labels=5),
    ),
    "mobilenet-v1": Entry(
        "classification",
        _model("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.25, image_size=_SIDE, num_labels=5),
    ),
    "mobilenet-v2": Entry(
        "classification",
        _model("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35, image_size=_SIDE, num_labels=5),
    ),
    "efficientnet": Entry(
        "classification",
        _model(
            "EfficientNetForImageClassification", "EfficientNetConfig",
            image_size=_SIDE, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, num_labels=5,
        ),
    ),
    "regnet": Entry(
        "classification",
        _model(
            "RegNetForImageClassification", "RegNetConfig",
            embedding_size=16, hidden_sizes=[16, 32, 48], depths=[1, 2, 1], groups_width=8, num_labels=5,
        ),
    ),
    "convnext": Entry(
        "classification",
        _model("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=5),
    ),
    "convnext-v2": Entry(
        "classification",
        _model("ConvNextV2ForImageClassification", "ConvNextV2Config", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=5),
    ),
    "poolformer": Entry(
        "classification",
        _model("PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_labels=5),
    ),
    "levit": Entry(
        "classification",
        _model(
            "LevitForImageClassification", "LevitConfig",
            image_size=_SIDE, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8], num_labels=5,
        ),
    ),
    "mobilevit": Entry(
        "classification",
        _model(
            "MobileViTForImageClassification", "MobileViTConfig",
            image_size=_SIDE, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64], num_labels=5,
        ),
    ),
    "mobilevit-v2": Entry(
        "classification",
        _model("MobileViTV2ForImageClassification", "MobileViTV2Config", image_size=_SIDE, width_multiplier=0.25, base_attn_unit_dims=[32, 48, 64], num_labels=5),
    ),
    "swiftformer": Entry(
        "classification",
        _model("SwiftFormerForImageClassification", "SwiftFormerConfig", image_size=_SIDE, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48], num_labels=5),
    ),
    "vit": Entry("classification", _model("ViTForImageClassification", "ViTConfig", **_TRANSFORMER, num_labels=5)),
    "vit-eager": Entry(
        "classification",
        _model("ViTForImageClassification", "ViTConfig", **_TRANSFORMER, num_labels=5, attn_implementation="eager"),
    ),
    "deit": Entry("classification", _model("DeiTForImageClassification", "DeiTConfig", **_TRANSFORMER, num_labels=5)),
    "beit": Entry(
        "classification",
        _model("BeitForImageClassification", "BeitConfig", **_TRANSFORMER, use_relative_position_bias=True, num_labels=5),
    ),
    "dinov2": Entry(
        "classification",
        _model(
            "Dinov2ForImageClassification", "Dinov2Config",
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=_SIDE, patch_size=16,
            use_swiglu_ffn=True, num_labels=5,
        ),
    ),
    "swin": Entry("classification", _model("SwinForImageClassification", "SwinConfig", **_SWIN, num_labels=5)),
    "swin-v2": Entry("classification", _model("Swinv2ForImageClassification", "Swinv2Config", **_SWIN, num_labels=5)),
    "pvt": Entry(
        "classification",
        _model("PvtForImageClassification", "PvtConfig", image_size=_SIDE, depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 48], num_attention_heads=[1, 2, 2, 4], num_labels=5),
    ),
    "pvt-v2": Entry(
        "classification",
        _model("PvtV2ForImageClassification", "PvtV2Config", image_size=_SIDE, depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 48], num_attention_heads=[1, 2, 2, 4], num_labels=5),
    ),
    "cvt": Entry(
        "classification",
        _model("CvtForImageClassification", "CvtConfig", embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3], num_labels=5),
    ),
    "focalnet": Entry(
        "classification",
        _model("FocalNetForImageClassification", "FocalNetConfig", image_size=_SIDE, embed_dim=16, depths=[1, 1, 1, 1], num_labels=5),
    ),
    "hiera": Entry(
        "classification",
        _model("HieraForImageClassification", "HieraConfig", image_size=[_SIDE, _SIDE], embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], num_labels=5),
    ),
    "textnet": Entry(
        "classification",
        _model("TextNetForImageClassification", "TextNetConfig", image_size=[_SIDE, _SIDE], stem_out_channels=16, hidden_sizes=[16, 16, 24, 32, 48], num_labels=5),
    ),
    "clip-vision": Entry("features", _model("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", **_TRANSFORMER, projection_dim=24)),
    "siglip-vision": Entry("features", _model("SiglipVisionModel", "SiglipVisionConfig", "pooler_output", **_TRANSFORMER)),
    "clip": Entry(
        "matching",
        _model(
            "CLIPModel", "CLIPConfig", "logits_per_image", "image_embeds", takes=("input_ids", "pixel_values"),
            vision_config=_TRANSFORMER,
            text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 2},
            projection_dim=24,
        ),
        words=6,
    ),
    "yolos": Entry(
        "detection",
        _model("YolosForObjectDetection", "YolosConfig", *_BOXES, **{**_TRANSFORMER, "image_size": [_SIDE, _SIDE]}, num_detection_tokens=5, num_labels=5),
    ),
    "detr": Entry(
        "detection",
        _model("DetrForObjectDetection", "DetrConfig", *_BOXES, **_DETR, **_NO_TIMM, backbone_config=_config("ResNetConfig", **_RESNET, out_features=["stage4"])),
    ),
    "conditional-detr": Entry(
        "detection",
        _model("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", *_BOXES, **_DETR, **_NO_TIMM, backbone_config=_config("ResNetConfig", **_RESNET, out_features=["stage4"])),
    ),
    "deformable-detr": Entry(
        "detection",
        _model("DeformableDetrForObjectDetection", "DeformableDetrConfig", *_BOXES, **_DETR, **_NO_TIMM, backbone_config=_config("ResNetConfig", **_RESNET, out_features=["stage2", "stage3", "stage4"])),
    ),
    "rt-detr": Entry(
        "detection",
        _model(
            "RTDetrForObjectDetection", "RTDetrConfig", *_BOXES,
            backbone_config=_config("RTDetrResNetConfig", **_RESNET, out_features=["stage2", "stage3", "stage4"]),
            encoder_hidden_dim=32, encoder_in_channels=[32, 48, 64], encoder_ffn_dim=48, d_model=32, num_queries=10,
            decoder_in_channels=[32, 32, 32], decoder_layers=1, decoder_ffn_dim=48, decoder_attention_heads=4,
            encoder_attention_heads=4, num_labels=5,
        ),
    ),
    "d-fine": Entry(
        "detection",
        _model(
            "DFineForObjectDetection", "DFineConfig", *_BOXES,
            backbone_config=_config("HGNetV2Config", stem_channels=[3, 8, 16], stage_in_channels=[16, 16, 32, 48], stage_mid_channels=[8, 8, 16, 16], stage_out_channels=[16, 32, 48, 64], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[2, 2, 2, 2], out_features=["stage2", "stage3", "stage4"]),
            encoder_hidden_dim=32, encoder_in_channels=[32, 48, 64], encoder_ffn_dim=48, d_model=32, num_queries=10,
            decoder_in_channels=[32, 32, 32], decoder_layers=2, decoder_ffn_dim=48, decoder_attention_heads=4,
            encoder_attention_heads=4, num_labels=5,
        ),
    ),
    "segformer": Entry(
        "segmentation",
        _model("SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32, num_labels=5),
    ),
    "upernet": Entry(
        "segmentation",
        _model(
            "UperNetForSemanticSegmentation", "UperNetConfig", hidden_size=32, auxiliary_channels=16, auxiliary_in_channels=32, num_labels=5, **_NO_TIMM,
            backbone_config=_config("ConvNextConfig", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]),
        ),
    ),
    "mobilevit-deeplab": Entry(
        "segmentation",
        _model(
            "MobileViTForSemanticSegmentation", "MobileViTConfig",
            image_size=_SIDE, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64], aspp_out_channels=24, num_labels=5,
        ),
    ),
    "mask2former": Entry(
        "segmentation",
        _model(
            "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig", "class_queries_logits", "masks_queries_logits", **_NO_TIMM,
            backbone_config=_config("SwinConfig", **{**_SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4], "window_size": 2}, out_features=["stage1", "stage2", "stage3", "stage4"]),
            feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48, dim_feedforward=48, encoder_layers=1, decoder_layers=2, num_attention_heads=4, num_queries=8, num_labels=5,
        ),
    ),
    "depth-anything": Entry(
        "depth",
        _model(
            "DepthAnythingForDepthEstimation", "DepthAnythingConfig", "predicted_depth", patch_size=16, reassemble_hidden_size=48, depth_estimation_type="metric", neck_hidden_sizes=[16, 16, 24, 24], fusion_hidden_size=16, head_hidden_size=8, **_NO_TIMM,
            backbone_config=_config("Dinov2Config", hidden_size=48, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=_SIDE, patch_size=16, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False),
        ),
    ),
    "swin2sr": Entry(
        "upscaling",
        _model("Swin2SRForImageSuperResolution", "Swin2SRConfig", "reconstruction", image_size=16, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        side=16,
    ),
}
