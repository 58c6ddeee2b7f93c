"""From a new task to a bundle: compose, profile, solve, cut, recover, export.

Each step takes data and gives data; nothing here talks to a broker, and nothing is remembered between calls. Who
wants to go on after a power cut wraps the steps in stages (:mod:`kiridashi_server.stages`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from kiridashi.artifacts import describe_file
from kiridashi.budget import Budget, Measurement, judge, measure_against
from kiridashi.errors import BudgetError
from kiridashi.manifest import Manifest, Preprocessing, TrainSpec, TrainVariant, VariantName
from kiridashi.probes import ProbeReport
from kiridashi.runtime import RUNTIMES

from kiridashi_server.amp.learning import learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.budget.device import measure_files, measure_probe_set
from kiridashi_server.budget.probes import ProbeSettings, export_bare, make_probe_set
from kiridashi_server.budget.profile import Profile, fit_profile
from kiridashi_server.budget.solver import Solution, plan_cut
from kiridashi_server.classifier import Classifier
from kiridashi_server.compose.composition import Composition, compose
from kiridashi_server.compose.stack import ScoreStack
from kiridashi_server.export.artifacts import ExportResult, ExportSettings, export_artifacts
from kiridashi_server.export.bundle import BundleFile, write_bundle
from kiridashi_server.export.drift_reference import drift_reference
from kiridashi_server.export.npz import deterministic_npz
from kiridashi_server.export.train_step_parameters import HEAD_PARAMETERS
from kiridashi_server.export.train_step_parity import StepParity
from kiridashi_server.export.train_step_trace import StepSettings
from kiridashi_server.export.train_step_variants import Variant, export_variants
from kiridashi_server.graph.fold import fold_batch_norm
from kiridashi_server.graph.plan import Plan
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.similarity.assessment import Assessment
from kiridashi_server.similarity.comparison import compare
from kiridashi_server.similarity.evidence import Evidence
from kiridashi_server.tasks import Samples

QUICK_PROBES = ProbeSettings(cuts=12, cliffs=())
_MAX_CORRECTIONS = 1

Measure = Callable[[Sequence[Path]], Sequence[Measurement]]
MeasureProbes = Callable[[Path], ProbeReport]


@dataclass(frozen=True)
class FittedPlan:
    """A plan whose cut was measured inside the budget.

    Attributes:
        solution: the plan and its forecast.
        measured: what the device measured for the cut's fp32 file of the profile's runtime.
        profile: the profile, corrected where the first forecast was off.
        corrections: how often the plan was solved again after a measurement.
    """

    solution: Solution
    measured: Measurement
    profile: Profile
    corrections: int


class Release(msgspec.Struct, frozen=True):
    """What a bundle is released as."""

    line: str
    version: int
    task: str
    labels: tuple[str, ...]


class TuneSettings(msgspec.Struct, frozen=True):
    """What the device is told about local tuning; ``variants`` are the sizes of the train step that it gets."""

    variants: tuple[VariantName, ...] = ("biases", "last-blocks", "all")
    batch: int = 16
    iterations: int = 30
    learning_rate: float = 0.005
    head_ridge: float = 1.0
    clip_norm: float = 1.0
    momentum: float = 0.9


@dataclass(frozen=True)
class BundleSpec:
    """What a bundle is to be, besides its model.

    Attributes:
        release: line, version, task and labels.
        budget: goes into the manifest; the device judges by it.
        explanation: why this mask, in words.
        tune: local tuning.
        settings: which artifacts, and what is good enough.
        independent: which calibration images do not repeat each other, for the drift reference; all without it.
    """

    release: Release
    budget: Budget
    explanation: str = ""
    tune: TuneSettings = field(default_factory=TuneSettings)
    settings: ExportSettings | None = None
    independent: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Exported:
    """A bundle with what its export measured; ``train_steps`` has an entry for each variant."""

    manifest: Manifest
    result: ExportResult
    train_steps: tuple[StepParity, ...]


def compose_scores(
    backbone: Backbone,
    records: Sequence[Record],
    samples: Samples,
    classes: int,
    seed: int,
    stack: ScoreStack | None = None,
    *,
    assessments: Sequence[Assessment] = (),
) -> tuple[Evidence, Composition]:
    """Compare a new task with the bank and compose scores for it.

    Where the bank alone does not justify reuse, the task's own few-shot scores are learnt and given their vote.

    Args:
        backbone: the dense model.
        records: the bank's records, of any backbone.
        samples: the new task's few labelled samples.
        classes: how many classes it has.
        seed: of learning own scores.
        stack: the records' scores, stacked: quicker for a large bank.
        assessments: of the bank's tasks; with enough of them, the verdict and the weights rest on them.
    """
    evidence = compare(backbone, records, samples, assessments=assessments)
    own = None
    if evidence.verdict != "reuse":
        own = learn_scores(backbone, samples, classes=classes, seed=seed).groups
    return evidence, compose(evidence, records, own=own, stack=stack)


def profile_backbone(
    backbone: Backbone,
    folder: Path,
    settings: ProbeSettings = QUICK_PROBES,
    *,
    measure: MeasureProbes = measure_probe_set,
    progress: Progress = no_progress,
) -> Profile:
    """Have the device measure cuts of the backbone, and fit the profile.

    Args:
        backbone: what will be cut.
        folder: for the cuts; what is there already is used again.
        settings: which cuts.
        measure: has a folder with a probe set measured.
        progress: of exporting the cuts, of which measuring is the last step.

    Raises:
        DeviceError: the device could not measure.
        ExportError: a cut cannot be exported.
    """
    probes = make_probe_set(backbone, folder, settings, progress=progress)
    return fit_profile(probes, measure(folder), backbone.quantities)


def fit_to_budget(
    backbone: Backbone,
    scores: ScoreMap,
    budget: Budget,
    profile: Profile,
    folder: Path,
    *,
    measure: Measure = measure_files,
) -> FittedPlan:
    """Solve, measure the cut on the device, and solve once more with a corrected profile if it is over.

    Raises:
        BudgetError: no cut can be expected to fit, or the corrected one was measured over the budget too.
    """
    corrections = 0
    while True:
        solution = plan_cut(backbone.quantities, scores, budget, profile)
        runtime = profile.runtime_name
        file = folder / f"candidate-{corrections}{RUNTIMES[runtime].suffix}"
        export_bare(backbone, solution.plan, file, runtime)
        measured = measure_against(budget, partial(_measure_one, measure, file))
        verdict = judge(budget, measured)
        if verdict.within:
            return FittedPlan(solution, measured, profile, corrections)
        if corrections == _MAX_CORRECTIONS:
            raise BudgetError(
                f"the cut is {verdict.describe(budget, measured)}",
                why="it was solved twice, the second time with the first measurement taken into account",
                next_step="measure again on a quiet machine, or allow a little more",
            )
        profile = profile.corrected(measured, solution.forecast)
        corrections += 1


def export_bundle(
    model: Classifier,
    backbone: Backbone,
    plan: Plan,
    calibration: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    spec: BundleSpec,
    folder: Path,
) -> Exported:
    """Fold, export every artifact and the train step, and write the bundle to ``folder / "bundle"``.

    Args:
        model: the recovered classifier.
        backbone: what it was cut from.
        plan: how.
        calibration: uint8 [n, H, W, 3]: for parity, int8 ranges, the probe and the drift reference.
        spec: what the manifest says besides, and what is exported.
        folder: work folder; files that are not in the bundle stay beside it.

    Raises:
        ExportError: an artifact differs from the model.
    """
    folded = Classifier(fold_batch_norm(model.features), model.head).eval()
    tunable = {name: value.detach().numpy().copy() for name, value in folded.named_parameters()}
    example = torch.zeros(1, *backbone.input_size)
    preprocessing = _preprocessing(backbone)
    result = export_artifacts(folded, example, calibration, preprocessing, tunable, folder / "artifacts", spec.settings)
    weights = next((one for one in result.artifacts if one.kind == "onnx-fp32"), None)
    variants: tuple[Variant, ...] = ()
    if weights is not None and spec.tune.variants:
        step = StepSettings(backbone.input_size, (), spec.tune.batch, spec.tune.clip_norm, spec.tune.momentum)
        rate, wanted = spec.tune.learning_rate, spec.tune.variants
        variants = export_variants(folded, step, wanted, rate, weights, result.folder)
    chosen = slice(None) if spec.independent is None else list(spec.independent)
    reference = drift_reference(calibration[chosen], result.logits[chosen], folder)
    files = [*result.files, reference, *(variant.file for variant in variants)]
    train = None
    if variants:
        state = folder / "train-state.npz"
        deterministic_npz(state, {name: tunable[name] for name in variants[0].entry.parameters})
        files.append(BundleFile(state, describe_file(state, "train-state")))
        train = _train_spec(spec.tune, [variant.entry for variant in variants], state.name)
    draft = _draft(backbone, plan, spec, train)
    manifest = write_bundle(folder / "bundle", draft, files, result.probe)
    return Exported(manifest, result, tuple(variant.parity for variant in variants))


def _draft(backbone: Backbone, plan: Plan, spec: BundleSpec, train: TrainSpec | None) -> Manifest:
    """The manifest, still without artifacts."""
    costs = backbone.costs
    return Manifest(
        line=spec.release.line,
        version=spec.release.version,
        task=spec.release.task,
        labels=spec.release.labels,
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        plan_digest=hashlib.sha256(plan.to_json().encode()).hexdigest(),
        parameters_dense=costs.parameters({}),
        parameters_kept=costs.parameters(plan.counts),
        preprocessing=_preprocessing(backbone),
        budget=spec.budget,
        artifacts=(),
        train=train,
        explanation=spec.explanation,
    )


def _train_spec(tune: TuneSettings, variants: Sequence[TrainVariant], state: str) -> TrainSpec:
    weight, bias = HEAD_PARAMETERS
    return TrainSpec(
        graph=variants[0].graph,
        state=state,
        parameters=variants[0].parameters,
        batch=tune.batch,
        iterations=tune.iterations,
        learning_rate=variants[0].learning_rate,
        head_weight=weight,
        head_bias=bias,
        head_ridge=tune.head_ridge,
        variants=tuple(variants),
    )


def _preprocessing(backbone: Backbone) -> Preprocessing:
    _, height, width = backbone.input_size
    return Preprocessing(height, width, _three(backbone.mean), _three(backbone.std))


def _measure_one(measure: Measure, file: Path) -> Measurement:
    (measured,) = measure([file])
    return measured


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
