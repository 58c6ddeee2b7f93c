"""The structure of ``report.json``: every number was measured in the run that wrote it, or says it was reused."""

from __future__ import annotations

from typing import Literal

import msgspec
from kiridashi.budget import Budget, Measurement


class BackboneEntry(msgspec.Struct, frozen=True):
    """The pre-trained model that everything was cut from."""

    name: str
    fingerprint: str
    parameters: int
    groups: int


class BankEntry(msgspec.Struct, frozen=True):
    """One past task: how long its scores took to learn, and its dense accuracy on its own validation images."""

    task: str
    seconds: float
    accuracy: float
    samples: int


class EvidenceEntry(msgspec.Struct, frozen=True):
    """How one record bears on the new task. Weights sum to one."""

    task: str
    similarity: float
    weight: float


class PlanEntry(msgspec.Struct, frozen=True):
    """What the cut kept, over all groups; parameters are the feature extractor's."""

    groups: int
    kept_units: int
    units: int
    params_before: int
    params_after: int
    binding: str
    corrections: int
    macs_before: int
    macs_after: int


class ResultEntry(msgspec.Struct, frozen=True):
    """One method at one size: accuracy on the device's test images, with a 95 % interval clustered by drawing.

    ``seconds`` is the whole time from the few labelled samples to the tuned model, export excluded;
    ``iterations`` are weight updates after the (last) cut, ``extra_iterations`` those spent before it.
    """

    method: str
    kept_params: int
    kept_share: float
    macs: int
    iterations: int
    extra_iterations: int
    accuracy: float
    low: float
    high: float
    seconds: float
    gain: float
    gain_low: float
    gain_high: float


class ArtifactEntry(msgspec.Struct, frozen=True):
    """One file of the bundle; parity is ``None`` for files that are not inference models."""

    kind: str
    name: str
    bytes: int
    sha256: str
    max_abs_diff: float | None
    top1_agreement: float | None


class DenseEntry(msgspec.Struct, frozen=True):
    """What the dense model was measured to need when the device was profiled."""

    memory_bytes: int
    file_bytes: int
    latency_p50_ms: float
    latency_p95_ms: float


class MeasuredEntry(Measurement, frozen=True, kw_only=True):
    """The measurement that decided, with its verdict."""

    verdict: Literal["within", "exceeded"]
    artifact: str


class TuneEntry(msgspec.Struct, frozen=True):
    """What local tuning did on the device."""

    iterations: int
    seconds: float
    samples: int
    holdout: int
    accuracy_before: float
    accuracy_head: float
    accuracy_after: float
    kept: bool
    reason: str


class DeviceEntry(msgspec.Struct, frozen=True):
    """The device agent as seen from outside and as it reported itself."""

    modules_forbidden_loaded: tuple[str, ...]
    idle_rss_bytes: int
    peak_rss_bytes: int
    tune: TuneEntry | None
    test_accuracy_delivered: float
    test_accuracy_active: float
    model_digest: str


class DeliveryEntry(msgspec.Struct, frozen=True):
    """What the bundle's way over MQTT took."""

    bytes: int
    seconds: float
    chunks: int
    resumed: int
    broker: str


class StageEntry(msgspec.Struct, frozen=True):
    """One stage; a reused one carries the time of the run that made it."""

    name: str
    seconds: float
    reused: bool


class PredictionEntry(msgspec.Struct, frozen=True):
    """A sample prediction made through ``LineModel``; ``image`` is a PNG data URI."""

    image: str
    truth: str
    label: str
    confidence: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of ``report.json``."""

    version: int = 1
    task: str
    labels: tuple[str, ...]
    seed: int
    hardware: Literal["real", "emulated"]
    machine: str
    backbone: BackboneEntry
    bank: tuple[BankEntry, ...]
    measure: str
    verdict: str
    explanation: tuple[str, ...]
    evidence: tuple[EvidenceEntry, ...]
    plan: PlanEntry
    results: tuple[ResultEntry, ...]
    artifacts: tuple[ArtifactEntry, ...]
    dropped: tuple[str, ...]
    budget: Budget
    measured: MeasuredEntry
    dense: DenseEntry
    device: DeviceEntry
    delivery: DeliveryEntry
    stages: tuple[StageEntry, ...]
    predictions: tuple[PredictionEntry, ...]
    notes: tuple[str, ...]
