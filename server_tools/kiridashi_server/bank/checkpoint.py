"""Read a checkpoint without running anything in it: safetensors, or a torch file with tensors and nothing else."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from kiridashi.errors import InputError
from torch import Tensor

from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.program import tensors_of, weight_names

_NESTED = ("state_dict", "model")
_SLACK_BYTES = 64 * 1024**2
_TIMES_THE_BACKBONE = 8


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A file's tensors by name, its metadata (safetensors only), and the SHA-256 of its bytes."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    sha256: str


def read_checkpoint(path: Path, backbone: Backbone) -> Checkpoint:
    """The file's tensors.

    Args:
        path: a safetensors file, or a zip that ``torch.save`` wrote, its state dict also under ``state_dict`` or
            ``model``.
        backbone: bounds the size: optimiser states and a head are fine, more than eight times the weights is not.

    Raises:
        InputError: it is missing, too large also when unpacked, of another format, or holds more than tensors.
    """
    limit = _TIMES_THE_BACKBONE * _bytes_of(backbone) + _SLACK_BYTES
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size <= limit else ""
    except OSError as error:
        raise InputError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    if size > limit:
        raise _too_large(path, size, limit)
    if zipfile.is_zipfile(path):
        return Checkpoint(path, _read_torch(path, limit), {}, digest)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            metadata, names = opened.metadata() or {}, opened.keys()
            return Checkpoint(path, {name: opened.get_tensor(name) for name in names}, metadata, digest)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is neither a safetensors file nor a zip of torch's",
            why=str(error),
            next_step="save the model's state dict as safetensors; files of torch before 1.6 are not read",
        ) from error


def backbone_weights(checkpoint: Checkpoint, backbone: Backbone) -> dict[str, Tensor]:
    """The checkpoint's tensors in place of the backbone's parameters and buffers, by the backbone's names.

    A common prefix, such as ``module.`` or ``features.``, is allowed, and so are tensors that the backbone does not
    have, such as a head.

    Raises:
        InputError: a tensor is missing, or has another shape or numbers that are not finite.
    """
    own = tensors_of(backbone.program)
    wanted = {name: own[name] for name in weight_names(backbone.program)}
    prefix = _prefix(checkpoint.tensors, wanted)
    found = {}
    for name, tensor in wanted.items():
        other = checkpoint.tensors.get(prefix + name)
        if other is None or other.shape != tensor.shape:
            what = "lacks it" if other is None else f"has it with shape {list(other.shape)}"
            raise InputError(
                f"{checkpoint.path} is not a checkpoint of {backbone.name}",
                why=f"the backbone has {name} with shape {list(tensor.shape)}; the file {what}",
                next_step="name the architecture with --backbone; a model that another tool pruned cannot be read",
            )
        if not torch.isfinite(other.double()).all():
            raise InputError(f"{checkpoint.path} holds numbers that are not finite", why=f"in {name}")
        found[name] = other
    return found


def _read_torch(path: Path, limit: int) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > limit:
            raise _too_large(path, size, limit)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} cannot be read as tensors",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            next_step="save the model's state dict, best as safetensors, not the model itself",
        ) from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no state dict", why=f"it holds a {type(content).__name__}")
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}


def _prefix(names: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What stands before the backbone's names in the checkpoint; empty if nothing fits."""
    first = next(iter(wanted))
    endings = [name[: -len(first)] for name in names if name == first or name.endswith("." + first)]
    return max(endings, key=lambda prefix: sum(prefix + name in names for name in wanted), default="")


def _bytes_of(backbone: Backbone) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(backbone.program).values())


def _too_large(path: Path, size: int, limit: int) -> InputError:
    return InputError(
        f"{path} holds {size:,} bytes", why=f"a checkpoint of this backbone may have {limit:,}, heads included"
    )
