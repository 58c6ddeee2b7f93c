"""Where a parameter's values lie in an artifact file, so that a device can replace them without any model library.

A parameter's own values do not identify it: biases start as zeros, two may be equal, and exporters merge equal
constants. So a file that shall be tunable is exported from a *marked* model, whose tunable parameters hold
random values that occur nowhere else; these are found in the file, and the true values are written over
them. That way the parity check of the finished file also proves the places: a wrong one gives wrong logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError
from kiridashi.manifest import Patch
from numpy.typing import NDArray

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError

Float32 = NDArray[np.float32]
_SEED = 0x6B697269
_SWAPPED = (1, 0)
_ORDERS: Mapping[int, tuple[tuple[int, ...], ...]] = {2: (_SWAPPED,), 4: ((0, 2, 3, 1), (1, 2, 3, 0))}


@dataclass(frozen=True)
class Located:
    """Places found in a file, and for every other parameter why it has none."""

    patches: tuple[Patch, ...]
    unlocated: Mapping[str, str]


def markers_for(parameters: Mapping[str, Float32]) -> dict[str, Float32]:
    """Values to tell each parameter by: random, of its shape, the same in every run."""
    return {
        name: np.random.default_rng([_SEED, index]).uniform(0.5, 1.5, values.shape).astype(np.float32)
        for index, (name, values) in enumerate(sorted(parameters.items()))
    }


def with_parameters(model: Classifier, parameters: Mapping[str, Float32]) -> Classifier:
    """A copy of ``model`` in which the named parameters hold other values."""
    changed = copy.deepcopy(model)
    own = dict(changed.named_parameters())
    with torch.no_grad():
        for name, values in parameters.items():
            own[name].copy_(torch.from_numpy(values))
    return changed


def check_tunable(model: Classifier, tunable: Mapping[str, Float32]) -> None:
    """Check that ``tunable`` are parameters of the model, with the model's values.

    Raises:
        InputError: an unknown name, another dtype or shape, or other values than the model holds.
    """
    own = dict(model.named_parameters())
    for name, values in tunable.items():
        if name not in own:
            raise InputError(f"the model has no parameter '{name}' to tune")
        held = own[name].detach().cpu().numpy()
        if values.dtype != np.float32 or held.dtype != np.float32 or values.shape != held.shape:
            raise InputError(
                f"the tunable parameter '{name}' is {values.dtype} {values.shape}",
                why=f"the model holds {held.dtype} {held.shape}, and tuning needs float32",
            )
        if not np.array_equal(values, held):
            raise InputError(f"the values given for '{name}' are not those of the model")


def locate_parameters(path: Path, parameters: Mapping[str, Float32]) -> Located:
    """Find each parameter's values, little-endian float32, in a file of any format.

    A 2-D parameter is also looked for with its axes swapped, a 4-D one as TFLite has it: [O, H, W, I], or [1, H, W, O]
    where it is depthwise. Only a single match counts.

    Args:
        path: an ONNX or TFLite file.
        parameters: values that tell the parameters apart; see ``markers_for``.
    """
    data = path.read_bytes()
    patches, unlocated = [], {}
    for name, values in parameters.items():
        matches = [
            Patch(name, offset, values.shape, axes == _SWAPPED, () if axes in (None, _SWAPPED) else axes)
            for axes, form in _forms(values).items()
            for offset in _occurrences(data, form)
        ]
        if len(matches) == 1:
            patches.append(matches[0])
        elif matches:
            unlocated[name] = f"its values occur {len(matches)} times in {path.name}"
        else:
            unlocated[name] = f"its values are not in {path.name} as float32"
    return Located(tuple(patches), unlocated)


def _forms(values: Float32) -> dict[tuple[int, ...] | None, Float32]:
    """The orders in which a file may hold values, by their axes; each order of the bytes once."""
    forms: dict[tuple[int, ...] | None, Float32] = {None: values}
    seen = {_file_bytes(values)}
    for axes in _ORDERS.get(values.ndim, ()):
        form = values.transpose(axes)
        if _file_bytes(form) not in seen:
            seen.add(_file_bytes(form))
            forms[axes] = form
    return forms


def _occurrences(data: bytes, values: Float32) -> list[int]:
    pattern = _file_bytes(values)
    found, offset = [], data.find(pattern) if pattern else -1
    while offset >= 0:
        found.append(offset)
        offset = data.find(pattern, offset + 1)
    return found


def _file_bytes(values: Float32) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def place_parameters(
    export: Callable[[Mapping[str, Float32]], Path], tunable: Mapping[str, Float32], path: Path
) -> Located:
    """Make a file in which the tunable parameters have known places and hold their true values.

    Args:
        export: writes the file with the given values in place of the true ones, and says where.
        tunable: the true values.
        path: the finished file.

    A parameter whose marker is not found was merged into something else by the exporter; the file is then made
    again with that parameter's true values, and the parameter is reported.
    """
    markers, unlocated = markers_for(tunable), dict[str, str]()
    while True:
        marked = export(markers)
        found = locate_parameters(marked, markers)
        if not found.unlocated:
            break
        unlocated.update(found.unlocated)
        markers = {name: values for name, values in markers.items() if name not in unlocated}
    write_parameters(marked, path, found.patches, tunable)
    return Located(found.patches, unlocated)


def write_parameters(source: Path, target: Path, patches: Sequence[Patch], values: Mapping[str, Float32]) -> None:
    """Write a copy of an artifact file in which the patched parameters hold ``values``.

    Raises:
        ExportError: a patch reaches over the end of the file, or a value has another shape than its patch.
    """
    data = bytearray(source.read_bytes())
    for patch in patches:
        new = values[patch.parameter]
        size = 4 * math.prod(patch.shape)
        if new.shape != patch.shape or patch.offset + size > len(data):
            raise ExportError(f"the values for '{patch.parameter}' do not fit its place in {source.name}")
        data[patch.offset : patch.offset + size] = _file_bytes(new.transpose(patch.order))
    write_atomic(target, bytes(data))
