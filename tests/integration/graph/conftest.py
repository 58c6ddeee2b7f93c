"""Small random instances of real architectures, in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn


class Logits(nn.Module):
    """A classifier of transformers as a module that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _resnet(layer_type: str) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type=layer_type, num_labels=5
    )
    return Logits(transformers.ResNetForImageClassification(config))


def _mobilenet_v2() -> nn.Module:
    config = transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=5)
    return Logits(transformers.MobileNetV2ForImageClassification(config))


def _vit(attention: str) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=64,
        patch_size=16,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=5,
        attn_implementation=attention,
    )
    return Logits(transformers.ViTForImageClassification(config))


def _efficientnet() -> nn.Module:
    config = transformers.EfficientNetConfig(
        image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, num_labels=5
    )
    return Logits(transformers.EfficientNetForImageClassification(config))


def _mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64], num_labels=5
    )
    return Logits(transformers.MobileViTForImageClassification(config))


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return Logits(transformers.SwinForImageClassification(config))


def _regnet() -> nn.Module:
    config = transformers.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48], depths=[1, 2, 1], groups_width=8, num_labels=5
    )
    return Logits(transformers.RegNetForImageClassification(config))


def _convnext_v2() -> nn.Module:
    config = transformers.ConvNextV2Config(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=5)
    return Logits(transformers.ConvNextV2ForImageClassification(config))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "resnet-basic": lambda: _resnet("basic"),
    "resnet-bottleneck": lambda: _resnet("bottleneck"),
    "mobilenet-v2": _mobilenet_v2,
    "vit-fused": lambda: _vit("sdpa"),
    "vit-plain": lambda: _vit("eager"),
    "efficientnet": _efficientnet,
    "mobilevit": _mobilevit,
    "swin": _swin,
    "regnet": _regnet,
    "convnext-v2": _convnext_v2,
}


def randomise(module: nn.Module) -> nn.Module:
    """Float64, with normalisation statistics and affine parameters that hide no mistake."""
    generator = torch.Generator().manual_seed(11)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                tensor.copy_(noise(tensor).abs() + 0.5)
            elif name.endswith("running_mean"):
                tensor.copy_(noise(tensor))
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * noise(tensor) if name.endswith("weight") else 0.3 * noise(tensor))
    return module


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks run faster on one thread than on several that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_architecture() -> Callable[[str], nn.Module]:
    """A small instance by name, with random weights."""

    def make(name: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the libraries initialise from torch's global generator
            return randomise(ARCHITECTURES[name]())

    return make


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
