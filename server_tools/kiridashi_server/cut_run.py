"""One resumable run from a new task to a bundle: the steps of the pipeline, each kept when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch
from kiridashi.artifacts import write_atomic
from kiridashi.budget import CALM_TAIL, Budget, Measurement
from kiridashi.manifest import ArtifactKind

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.budget.device import measure_files
from kiridashi_server.budget.profile import Forecast, Profile
from kiridashi_server.budget.solver import plan_cut
from kiridashi_server.classifier import Classifier
from kiridashi_server.compose.stack import ScoreStack
from kiridashi_server.export.artifacts import ALL_KINDS, ExportSettings
from kiridashi_server.export.drift_reference import first_of_each
from kiridashi_server.graph.cut import load_cut, save_cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.pipeline import (
    BundleSpec,
    Measure,
    Release,
    compose_scores,
    export_bundle,
    fit_to_budget,
    profile_backbone,
)
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.iterations import RecoverSettings, recover_cut
from kiridashi_server.report.schema import ArtifactEntry, EvidenceEntry
from kiridashi_server.similarity.assessment import Assessment
from kiridashi_server.stages import Workspace
from kiridashi_server.stock.pieces import Stock
from kiridashi_server.tasks import Samples

Bar = Callable[[str], AbstractContextManager[Progress]]
"""A progress bar: ``with bar("cutting") as advance: advance(done, total)``."""


class Composed(msgspec.Struct, frozen=True):
    """Composed scores by group, with their story."""

    measure: str
    verdict: str
    explanation: str
    evidence: tuple[EvidenceEntry, ...]
    scores: dict[str, list[float]]

    def score_map(self) -> ScoreMap:
        """The scores as arrays."""
        return {name: np.array(values, dtype=np.float32) for name, values in self.scores.items()}


class Planned(msgspec.Struct, frozen=True):
    """The solved plan as JSON, its counts, what it is expected to need, and what was measured for its cut.

    ``measured`` is ``None`` when the profile came from elsewhere and the device could not be asked: this machine is not
    the device then, and the device measures the bundle itself before it goes live.
    """

    plan: str
    parameters: int
    macs: int
    binding: str
    corrections: int
    importance: float
    gap: float
    forecast: Forecast
    measured: Measurement | None


class CutResult(msgspec.Struct, frozen=True):
    """The recovered cut: loss of the first and the last iteration (if any), and seconds of cutting and recovering.

    ``piece`` is the number of the stock's piece that it was cut out of, from 0; ``None`` without a stock.
    """

    iterations: int
    loss_first: float | None
    loss_last: float | None
    seconds: float
    piece: int | None = None


class Exported(msgspec.Struct, frozen=True):
    """The bundle's files, what was left out and why, and how the train step agrees with torch."""

    files: tuple[ArtifactEntry, ...]
    dropped: tuple[str, ...]
    gradient_max_rel: float
    loss_max_abs_diff: float


@dataclass(frozen=True)
class CutRequest:
    """What a run is asked for.

    Attributes:
        backbone: what is cut.
        records: the bank's records.
        assessments: of the bank's tasks.
        samples: the new task's few labelled samples.
        calibration: images for parity, int8 ranges and the probe; better not those it was trained on.
        release: line, version, task and labels of the bundle.
        budget: limits; ``None`` asks for :func:`default_budget` of the profile.
        profile: another device's profile; ``None``: this machine is the device, and is measured.
        device: the name of the device whose profile it is, if it can be asked.
        measure: has model files measured on that device.
        recover: how the cut is recovered.
        recovery: in words where that comes from; goes into the bundle's explanation.
        stock: what the model is cut out of; ``None``: the backbone as it is.
        kinds: artifacts to export.
        seed: of everything random.
        stack: the records' scores, stacked, for a large bank.
    """

    backbone: Backbone
    records: Sequence[Record]
    samples: Samples
    calibration: Samples
    release: Release
    assessments: Sequence[Assessment] = ()
    budget: Budget | None = None
    profile: Profile | None = None
    device: str = ""
    measure: Measure | None = None
    recover: RecoverSettings = field(default_factory=RecoverSettings)
    recovery: str = ""
    stock: Stock | None = None
    kinds: tuple[ArtifactKind, ...] = ALL_KINDS
    seed: int = 0

    @property
    def stock_digest(self) -> str:
        """What tells stocks, and their absence, apart."""
        return self.stock.digest if self.stock else ""

    stack: ScoreStack | None = None


def default_budget(profile: Profile) -> Budget:
    """A budget for who names none: 90 % of the dense model's memory, 40 % of its file, 80 % of its p95 latency.

    That p95 is the dense model's undisturbed time, times what the tail came to over all measured cuts. It is left
    unlimited when the tail is more than three times the undisturbed time: such a tail belongs to whatever else uses the
    machine, and a limit taken from it would be noise (:func:`too_busy`).
    """
    dense = profile.dense
    return Budget(
        memory_bytes=int(0.9 * dense.memory_bytes),
        file_bytes=int(0.4 * dense.file_bytes),
        latency_p95_ms=None if too_busy(profile) else 0.8 * profile.tail * dense.quiet_ms,
    )


def too_busy(profile: Profile) -> bool:
    """Whether the measured tails say more about the machine's other work than about the models."""
    return profile.tail > CALM_TAIL


def no_bar(label: str) -> AbstractContextManager[Progress]:
    """The progress bar of a program that shows none."""
    del label
    return nullcontext(no_progress)


class CutRun:
    """The stages of one run, in a workspace; ask for what you need, and what it needs is done first.

    Args:
        request: what is wanted.
        workspace: where finished stages are kept.
        bar: shows progress.
    """

    def __init__(self, request: CutRequest, workspace: Workspace, bar: Bar = no_bar) -> None:
        self.request = request
        self.workspace = workspace
        self._bar = bar

    @cached_property
    def composed(self) -> Composed:
        """Scores for the new task, from the bank's evidence."""
        request = self.request

        def work(folder: Path) -> Composed:
            evidence, composition = compose_scores(
                request.backbone,
                request.records,
                request.samples,
                len(request.release.labels),
                request.seed,
                request.stack,
                assessments=request.assessments,
            )
            items = tuple(
                EvidenceEntry(item.task, item.similarity, composition.weights.get(item.record_id, 0.0))
                for item in evidence.items
            )
            return Composed(
                measure=evidence.measure,
                verdict=evidence.verdict,
                explanation=composition.explanation,
                evidence=items,
                scores={name: values.tolist() for name, values in composition.scores.items()},
            )

        return self.workspace.run("evidence", self._identity, work, Composed)

    @cached_property
    def profile(self) -> Profile:
        """The device's profile: the given one, or this machine's."""
        if self.request.profile is not None:
            return self.request.profile
        backbone = self.request.backbone

        def work(folder: Path) -> Profile:
            with self._bar("cuts") as advance:
                return profile_backbone(backbone, folder, progress=advance)

        return self.workspace.run("profile", [backbone.fingerprint, backbone.input_size], work, Profile)

    @cached_property
    def budget(self) -> Budget:
        """The limits in force."""
        return self.request.budget or default_budget(self.profile)

    @cached_property
    def planned(self) -> Planned:
        """The plan, measured inside the budget where this machine is the device, or the device can be asked."""
        scores, profile, budget = self.composed.score_map(), self.profile, self.budget
        request, is_here = self.request, self.request.profile is None
        backbone, measure = request.backbone, measure_files if is_here else request.measure

        def work(folder: Path) -> Planned:
            fitted = fit_to_budget(backbone, scores, budget, profile, folder, measure=measure) if measure else None
            solution = fitted.solution if fitted else plan_cut(backbone.quantities, scores, budget, profile)
            return Planned(
                plan=solution.plan.to_json(),
                parameters=solution.parameters,
                macs=solution.macs,
                binding=solution.binding or "none",
                corrections=fitted.corrections if fitted else 0,
                importance=solution.importance,
                gap=solution.gap,
                forecast=solution.forecast,
                measured=fitted.measured if fitted else None,
            )

        return self.workspace.run("plan", [self._identity, budget, profile, is_here, request.device], work, Planned)

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return Plan.from_json(self.planned.plan)

    @cached_property
    def cut(self) -> CutResult:
        """The cut, recovered and stored; :meth:`model` loads it."""
        request, plan = self.request, self.plan

        def work(folder: Path) -> CutResult:
            with self._bar("iterations") as advance:
                recovered = recover_cut(
                    request.backbone,
                    plan,
                    request.samples,
                    classes=len(request.release.labels),
                    settings=request.recover,
                    seed=request.seed,
                    progress=advance,
                    blank=request.stock.blank(plan) if request.stock else None,
                )
            save_cut(folder / "features.safetensors", plan, recovered.model.features)
            head = {name: value.detach().contiguous() for name, value in recovered.model.head.state_dict().items()}
            write_atomic(folder / "head.safetensors", safetensors.torch.save(head))
            losses = recovered.losses or (None,)
            piece = request.stock.number_for(plan) if request.stock else None
            return CutResult(len(recovered.losses), losses[0], losses[-1], recovered.seconds, piece)

        inputs = [self._identity, self.planned.plan, request.recover, request.stock_digest]
        return self.workspace.run("cut", inputs, work, CutResult)

    def model(self) -> Classifier:
        """The recovered classifier, as stored."""
        self.cut  # noqa: B018 - runs the stage
        folder = self.workspace.place("cut")
        backbone = self.request.backbone
        _, features = load_cut(backbone.program, backbone.tracking, folder / "features.safetensors")
        head = safetensors.torch.load_file(folder / "head.safetensors")
        classes, width = head["weight"].shape
        linear = torch.nn.Linear(width, classes)
        linear.load_state_dict(head)
        return Classifier(features, linear).eval()

    @cached_property
    def exported(self) -> Exported:
        """The bundle, in :attr:`bundle`."""
        request = self.request
        self.cut  # noqa: B018 - runs its stage first, so that its time is its own

        def work(folder: Path) -> Exported:
            spec = BundleSpec(
                request.release,
                self.budget,
                explanation=self.explanation,
                settings=ExportSettings(kinds=request.kinds),
                independent=first_of_each(request.calibration.sources),
            )
            done = export_bundle(self.model(), request.backbone, self.plan, request.calibration.images, spec, folder)
            files = tuple(
                ArtifactEntry(
                    kind=one.kind,
                    name=one.name,
                    bytes=one.bytes,
                    sha256=one.sha256,
                    max_abs_diff=one.parity.max_abs_diff if one.parity else None,
                    top1_agreement=one.parity.top1_agreement if one.parity else None,
                )
                for one in done.manifest.artifacts
            )
            dropped = tuple(f"{kind}: {why}" for kind, why in done.result.dropped.items())
            steps = done.train_steps
            gradients = max((step.gradient_max_rel for step in steps), default=0.0)
            return Exported(files, dropped, gradients, max((step.loss_max_abs_diff for step in steps), default=0.0))

        inputs = [self._identity, request.calibration.digest, self.planned.plan, request.recover, request.release]
        inputs.append(request.recovery)
        return self.workspace.run("export", [*inputs, self.budget, request.kinds, request.stock_digest], work, Exported)

    @property
    def explanation(self) -> str:
        """Why this mask and this recovery, in words."""
        return "; ".join(filter(None, [self.composed.explanation, self.request.recovery]))

    @property
    def bundle(self) -> Path:
        """The bundle's folder, once :attr:`exported` is there."""
        return self.workspace.place("export") / "bundle"

    @cached_property
    def _identity(self) -> list[object]:
        """What every stage depends on."""
        request = self.request
        return [
            request.backbone.fingerprint,
            sorted(record.id for record in request.records),
            *sorted(request.assessments, key=repr),
            request.samples.digest,
            request.release.labels,
            request.seed,
        ]
