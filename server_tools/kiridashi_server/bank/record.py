"""What the bank keeps of one past task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap

FloatArray = npt.NDArray[np.float32]

Kind: TypeAlias = Literal["learnt", "tuned", "masked", "pruned"]
"""Where scores come from: learnt from a task's samples, or read off a tuned, a masked or a pruned checkpoint."""

Policy: TypeAlias = Literal["internal", "shareable"]
"""Who may use a record: this bank only, or whoever an exported archive is given to."""

HEAD = ("head_weight", "head_bias")
MOMENTS = ("feature_mean", "feature_variance")
_DESCRIPTOR = (*HEAD, *MOMENTS)


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from; not part of its identity.

    Attributes:
        seed: of the learning run.
        settings: of the learning run, as plain values.
        code_version: version of this package.
        task_digest: digest of the task's samples; empty where there were none.
        seconds: wall time of learning.
        origin: what else is known: the checkpoint it was read from, who signed its archive, which backbone it was
            carried over from. Empty for a record that was learnt here.
    """

    seed: int
    settings: Mapping[str, Any]
    code_version: str
    task_digest: str
    seconds: float
    origin: str = ""


class StoredScores(Mapping[str, FloatArray]):
    """Scores that stay in the bank's store until they are first looked at.

    Args:
        load: reads them; called once.
    """

    def __init__(self, load: Callable[[], Mapping[str, FloatArray]]) -> None:
        self._load = load

    @cached_property
    def _arrays(self) -> Mapping[str, FloatArray]:
        return self._load()

    def __getitem__(self, name: str) -> FloatArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclass(frozen=True, eq=False)
class Record:
    """One past task's knowledge about the backbone. Holds no image and no cut weights.

    Head and feature moments need the task's samples. A record made without them has neither, and measures that need
    them leave it out.

    Attributes:
        task: name of the task.
        labels: its class names; may be empty where there is no head.
        backbone_fingerprint: the backbone that the scores and the head belong to.
        layout_digest: the layout whose groups the scores are for.
        samples: how many samples it was learnt from; 0 for a checkpoint's.
        scores: raw scores by group, float32 [size]; scores of different kinds have different scales.
        taylor: first-order scores by group, float32 [size]; may be empty.
        head_weight: of the task's head on the uncut backbone's features, float32 [classes, D], or None.
        head_bias: float32 [classes], or None.
        feature_mean: mean of those features over the samples, float32 [D], or None.
        feature_variance: their variance, float32 [D], or None.
        outcomes: measured accuracies by name.
        provenance: how it was made.
        policy: who may use it.
        created: UTC time, ISO 8601.
        kind: where the scores come from.
    """

    task: str
    labels: tuple[str, ...]
    backbone_fingerprint: str
    layout_digest: str
    samples: int
    scores: ScoreMap
    provenance: Provenance
    created: str
    head_weight: FloatArray | None = None
    head_bias: FloatArray | None = None
    feature_mean: FloatArray | None = None
    feature_variance: FloatArray | None = None
    taylor: ScoreMap = field(default_factory=dict)
    outcomes: Mapping[str, float] = field(default_factory=dict)
    policy: Policy = "internal"
    kind: Kind = "learnt"

    def __post_init__(self) -> None:
        self._check_descriptor()
        if not isinstance(self.scores, StoredScores) and not self.scores:
            raise InputError(f"the record of '{self.task}' has no scores")
        check_policy(self.policy)
        if self.kind not in get_args(Kind):
            raise InputError(f"there is no kind of record '{self.kind}'", why=f"known are: {', '.join(get_args(Kind))}")

    def _check_descriptor(self) -> None:
        weight, mean = self.head_weight, self.feature_mean
        classes = len(self.labels)
        width = weight.shape[-1] if weight is not None else (mean.size if mean is not None else 0)
        wanted = {
            "head_weight": None if weight is None else (classes, width),
            "head_bias": None if weight is None else (classes,),
            "feature_mean": None if mean is None else (width,),
            "feature_variance": None if mean is None else (width,),
        }
        for name, shape in wanted.items():
            array = getattr(self, name)
            found = None if array is None else array.shape
            if found != shape:
                raise InputError(
                    f"the record of '{self.task}' has {name} of shape {found and list(found)}",
                    why=f"{classes} classes and {width} features need {shape and list(shape)}",
                )

    @property
    def moments(self) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of the task's features, float32 [D] each.

        Raises:
            InputError: the record was made without the task's images.
        """
        if self.feature_mean is None or self.feature_variance is None:
            raise InputError(f"the record of '{self.task}' has no feature moments")
        return self.feature_mean, self.feature_variance

    @cached_property
    def id(self) -> str:
        """Hex SHA-256 of what was learnt: the same knowledge has the same id, whenever and however fast learnt."""
        return record_id(self, {kind: hashlib.sha256(data).hexdigest() for kind, data in encode_arrays(self).items()})

    def lacks(self, names: Sequence[str]) -> bool:
        """Whether one of these arrays (:data:`HEAD`, :data:`MOMENTS`) is not there."""
        return any(getattr(self, name) is None for name in names)


def check_policy(policy: str) -> Policy:
    """``policy`` as such.

    Raises:
        InputError: it is none.
    """
    if policy not in get_args(Policy):
        raise InputError(f"there is no policy '{policy}'", next_step=f"use one of: {', '.join(get_args(Policy))}")
    return cast("Policy", policy)


def record_id(record: Record, digests: Mapping[str, str]) -> str:
    """The id of a record whose stored arrays have these SHA-256 digests by kind."""
    parts: dict[str, Any] = {
        "task": record.task,
        "labels": record.labels,
        "backbone": record.backbone_fingerprint,
        "layout": record.layout_digest,
        "samples": record.samples,
        "blobs": dict(digests),
    }
    if record.kind != "learnt":  # ids of learnt records are older than kinds
        parts["kind"] = record.kind
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode_arrays(record: Record) -> dict[str, bytes]:
    """The record's arrays as safetensors files by blob kind: the same arrays give the same bytes.

    Raises:
        InputError: numbers that are not finite.
    """
    descriptor = {name: getattr(record, name) for name in _DESCRIPTOR if not record.lacks((name,))}
    blobs = {"scores": _save(record.scores), "taylor": _save(record.taylor)}
    return blobs | ({"descriptor": _save(descriptor)} if descriptor else {})


def decode_scores(data: bytes) -> dict[str, FloatArray]:
    """Scores by group, from a blob of kind ``scores`` or ``taylor``.

    Raises:
        ValueError: it is no safetensors file, or does not hold float32 vectors of finite numbers.
    """
    arrays = _load(data)
    if any(array.ndim != 1 for array in arrays.values()):
        raise ValueError("scores must be vectors")
    return arrays


def decode_descriptor(data: bytes | None) -> dict[str, FloatArray]:
    """Those of head and moments that the blob holds, by the name of their field.

    Raises:
        ValueError: as :func:`decode_scores`, or an array of another name.
    """
    arrays = {} if data is None else _load(data)
    if unknown := sorted(set(arrays) - set(_DESCRIPTOR)):
        raise ValueError(f"a descriptor has no {', '.join(unknown)}")
    return arrays


def _save(arrays: Mapping[str, FloatArray]) -> bytes:
    whole = {name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)}
    if wrong := [name for name, array in whole.items() if not np.isfinite(array).all()]:
        raise InputError(f"'{wrong[0]}' of a record holds numbers that are not finite")
    return safetensors.numpy.save(whole)


def _load(data: bytes) -> dict[str, FloatArray]:
    try:
        arrays: dict[str, FloatArray] = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(f"'{name}' does not hold finite float32 numbers")
    return arrays
