"""What the bank keeps of one past task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap

FloatArray = npt.NDArray[np.float32]

BLOB_KINDS = ("scores", "taylor", "descriptor")
_DESCRIPTOR = ("head_weight", "head_bias", "feature_mean", "feature_variance")


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from; not part of its identity.

    Attributes:
        seed: of the learning run.
        settings: of the learning run, as plain values.
        code_version: version of this package.
        task_digest: digest of the task's samples.
        seconds: wall time of learning.
    """

    seed: int
    settings: Mapping[str, Any]
    code_version: str
    task_digest: str
    seconds: float


@dataclass(frozen=True, eq=False)
class Record:
    """One past task's knowledge about the backbone. Holds no image and no cut weights.

    Attributes:
        task: name of the task.
        labels: its class names.
        backbone_fingerprint: the backbone that the scores and the head belong to.
        layout_digest: the layout whose groups the scores are for.
        samples: how many samples it was learnt from.
        scores: raw learnt scores by group, float32 [size].
        taylor: first-order scores by group, float32 [size]; may be empty.
        head_weight: of the task's head on the uncut backbone's features, float32 [classes, D].
        head_bias: float32 [classes].
        feature_mean: mean of those features over the samples, float32 [D].
        feature_variance: their variance, float32 [D].
        outcomes: measured accuracies by name.
        provenance: how it was made.
        policy: who may use it; ``internal`` means this bank only.
        created: UTC time, ISO 8601.
    """

    task: str
    labels: tuple[str, ...]
    backbone_fingerprint: str
    layout_digest: str
    samples: int
    scores: ScoreMap
    head_weight: FloatArray
    head_bias: FloatArray
    feature_mean: FloatArray
    feature_variance: FloatArray
    provenance: Provenance
    created: str
    taylor: ScoreMap = field(default_factory=dict)
    outcomes: Mapping[str, float] = field(default_factory=dict)
    policy: str = "internal"

    def __post_init__(self) -> None:
        classes, width = len(self.labels), self.head_weight.shape[-1]
        wanted = {
            "head_weight": (classes, width),
            "head_bias": (classes,),
            "feature_mean": (width,),
            "feature_variance": (width,),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise InputError(
                    f"the record of '{self.task}' has {name} of shape {list(getattr(self, name).shape)}",
                    why=f"{classes} classes and {width} features need {list(shape)}",
                )
        if not self.scores:
            raise InputError(f"the record of '{self.task}' has no scores")

    @cached_property
    def id(self) -> str:
        """Hex SHA-256 of what was learnt: the same knowledge has the same id, whenever and however fast learnt."""
        parts = {
            "task": self.task,
            "labels": self.labels,
            "backbone": self.backbone_fingerprint,
            "layout": self.layout_digest,
            "samples": self.samples,
            "blobs": {kind: hashlib.sha256(data).hexdigest() for kind, data in encode_arrays(self).items()},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode_arrays(record: Record) -> dict[str, bytes]:
    """The record's arrays as safetensors files by blob kind: the same arrays give the same bytes."""
    return {
        "scores": _save(record.scores),
        "taylor": _save(record.taylor),
        "descriptor": _save({name: getattr(record, name) for name in _DESCRIPTOR}),
    }


def decode_arrays(blobs: Mapping[str, bytes]) -> dict[str, Any]:
    """The arguments of :class:`Record` that :func:`encode_arrays` wrote.

    Raises:
        ValueError: a blob is no safetensors file, or lacks an array.
    """
    try:
        descriptor = safetensors.numpy.load(blobs["descriptor"])
        return {
            "scores": safetensors.numpy.load(blobs["scores"]),
            "taylor": safetensors.numpy.load(blobs["taylor"]),
            **{name: descriptor[name] for name in _DESCRIPTOR},
        }
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _save(arrays: Mapping[str, FloatArray]) -> bytes:
    whole = {name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)}
    return safetensors.numpy.save(whole)
