"""What the zoo knows of an architecture, and how one from transformers is built and called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Job: TypeAlias = Literal["classification", "detection", "segmentation", "depth", "features", "matching", "upscaling"]

SIDE = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture.

    Attributes:
        job: what it is used for.
        make: builds it in float32, from torch's global generator; it gives tensors, not a library's objects.
        side: of its square input images, in pixels.
        words: length of the token sequence that is its first input, or 0.
        package: where it comes from.
    """

    job: Job
    make: Callable[[], nn.Module]
    side: int = SIDE
    words: int = 0
    package: str = "transformers"

    def build(self, seed: int) -> nn.Module:
        """The model in evaluation mode and float64, always the same for the same seed.

        Normalisations get random statistics and scales, and linear layers and tables that hardly vary get noise: as
        they are initialised, they would hide mistakes, and scores would be so close that rounding orders them.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)  # the libraries initialise from torch's global generator
            module = self.make().double().eval()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if name.endswith("running_var"):
                    tensor.copy_(noise.abs() + 0.5)
                elif name.endswith("running_mean"):
                    tensor.copy_(noise)
                elif tensor.is_floating_point() and tensor.dim() == 1:
                    tensor.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
                elif isinstance(tensor, nn.Parameter) and tensor.numel() > 1 and tensor.std() < _hardly(tensor):
                    tensor.add_(noise, alpha=0.1)
        return module

    def inputs(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        """Random inputs [batch, ...] in float64, token numbers int64."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, 3, self.side, self.side, generator=generator, dtype=torch.float64)
        if not self.words:
            return (images,)
        return torch.randint(1, 50, (batch, self.words), generator=generator), images


def _hardly(parameter: Tensor) -> float:
    """Standard deviation below which a parameter hardly varies; those of convolutions may be small."""
    return 0.05 if parameter.dim() == 2 else 1e-6


class Outputs(nn.Module):
    """A model of transformers as a module that takes tensors by place and gives the named outputs."""

    def __init__(self, model: nn.Module, *names: str, takes: tuple[str, ...] = ("pixel_values",)) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.takes = takes

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The named outputs for inputs in the order of ``takes``."""
        given: dict[str, Any] = dict(zip(self.takes, inputs, strict=True))
        result = self.model(**given)
        values = tuple(getattr(result, name) for name in self.names)
        return values if len(values) > 1 else values[0]


def model_of(
    class_name: str,
    config_name: str,
    *outputs: str,
    takes: tuple[str, ...] = ("pixel_values",),
    **settings: Any,
) -> Callable[[], nn.Module]:
    """A maker of the model class with that configuration; a setting that can be called is called for its value."""

    def make() -> nn.Module:
        import transformers

        made = {key: value() if callable(value) else value for key, value in settings.items()}
        config = getattr(transformers, config_name)(**made)
        return Outputs(getattr(transformers, class_name)(config), *(outputs or ("logits",)), takes=takes)

    return make


def config_of(name: str, **settings: Any) -> Callable[[], Any]:
    """A maker of that configuration, for a setting of another one."""

    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**settings)

    return make


TRANSFORMER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": SIDE,
    "patch_size": 16,
}
SWIN: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
RESNET: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
DETR: dict[str, Any] = {
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
NO_TIMM: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
BOXES = ("logits", "pred_boxes")
