"""Local tuning, in a child process with numpy and onnxruntime only: head, iterations, patch, validate, seal.

The order is fixed: the hold-out is predicted with the shipped file, then the head is fitted and the train step runs on
the training samples alone, then a copy of the file that will be deployed is patched, and *that file on that runtime*
predicts the hold-out again. Only then are the two compared, once. Before that the hold-out chooses nothing, unless the
iterations do clear harm (:mod:`kiridashi_agent.early_stop`). The bundle's other files get the same values, and smaller
ones are judged against that file.

Everything is written to ``tuned.part`` beside the shipped files and renamed to ``tuned`` at the very end, so a kill at
any moment leaves the slot without tuned files, never with half of them.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import sha256_file, sync_folder, write_atomic
from kiridashi.gathering import Gathered
from kiridashi.manifest import Artifact, TrainVariant
from kiridashi.messages import TuneReport
from kiridashi.preprocess import to_input
from kiridashi.runtime import open_model
from kiridashi.runtime.onnx import FEATURES, OnnxModel, load
from kiridashi.runtime.protocol import FloatArray, LoadedModel
from kiridashi.samples import Samples
from kiridashi.slots import TUNED_NAME, TUNING_NAME, LineSlots
from kiridashi.trust import SEAL_NAME, VALUES_NAME, Seal, load_or_create_key, sign_seal
from numpy.typing import NDArray

from kiridashi_agent.closed_form import Head, fit_head
from kiridashi_agent.early_stop import looked_at
from kiridashi_agent.gate import Judgement, judge_tuning
from kiridashi_agent.jobs import TRYING_NAME, TuneOutcome, TuneRequest
from kiridashi_agent.machine import available_bytes, peak_rss_bytes, rss_bytes
from kiridashi_agent.patching import patch_artifact, patched
from kiridashi_agent.steps import Look, StepsPlan, StepsResult, run_steps
from kiridashi_agent.survey import gathered
from kiridashi_agent.thermostat import Thermostat
from kiridashi_agent.tunable_bundle import TunableBundle, clear, open_bundle
from kiridashi_agent.tuned_files import TunedValues, write_others
from kiridashi_agent.variants import HEAD, Choice, variants_of

Request = TuneRequest
MEMORY_SHARE = 0.8
"""How much of the memory that the device has left the iterations may use, where no limit is set."""
_BATCH = 16


@dataclass(frozen=True)
class _Tuned:
    """Parameters after tuning, which sizes of the train step were there, and what the head alone reached."""

    values: dict[str, FloatArray]
    steps: StepsResult
    variant: str
    choice: Choice
    accuracy_head: float


def run(request: TuneRequest) -> TuneOutcome:
    """Tune one slot; see :func:`kiridashi_agent.jobs.tune` for what is raised."""
    started = time.perf_counter()
    slots = LineSlots(Path(request.state_dir), request.line)
    clear(slots, request)
    bundle = open_bundle(slots, request)
    found = gathered(request, bundle.manifest).keep()
    train, held = found.samples.part(holdout=False), found.samples.part(holdout=True)
    shortage = found.shortage(bundle.manifest.labels)
    if shortage:
        return _not_tuned(request, started, found, shortage)
    serving = Path(request.serving) if request.serving else bundle.folder
    before = _predict(_open(bundle, bundle.deployed, serving, request), bundle, held)
    thermostat = Thermostat(request.max_celsius)
    tuned = _tune(bundle, train, held, request, thermostat)
    part = bundle.folder / TUNING_NAME
    part.mkdir()
    patches = [patch for patch in bundle.target.patches if patch.parameter in tuned.values]
    patch_artifact(bundle.folder / bundle.target.name, patches, tuned.values, part / bundle.target.name)
    result = _judged(bundle, part, tuned, held, before, request)
    digest = ""
    if result.judgement.kept:
        digest = _seal(bundle, part, tuned.values, result.judgement, request, len(held))
        part.replace(bundle.folder / TUNED_NAME)
    else:
        shutil.rmtree(part)
    sync_folder(bundle.folder)
    report = msgspec.structs.replace(
        _report(tuned, result.judgement, (len(train), len(held)), time.perf_counter() - started),
        paused_s=thermostat.paused_s,
        celsius=thermostat.highest,
        sources=found.counts(),
        stale=tuple(result.stale),
        stale_reasons=result.stale,
    )
    return TuneOutcome(report, result.served.name if digest else request.artifact, digest)


@dataclass(frozen=True)
class _Result:
    """The verdict on the file that is to serve, which one that is, and why others do not have the values."""

    judgement: Judgement
    served: Artifact
    stale: dict[str, str]


def _judged(
    bundle: TunableBundle,
    part: Path,
    tuned: _Tuned,
    held: Samples,
    before: NDArray[np.int64],
    request: TuneRequest,
) -> _Result:
    """Judge the target; if it is kept, write the others, and let the deployed one serve if it is as good as before."""

    def predict(artifact: Artifact, folder: Path) -> NDArray[np.int64]:
        return _predict(_open(bundle, artifact, folder, request), bundle, held)

    names = bundle.manifest.labels
    after = predict(bundle.target, part)
    judgement = judge_tuning(held.labels, before, after, names, request.max_recall_drop)
    if not judgement.kept:
        return _Result(judgement, bundle.target, {})
    changed = {name for name, value in tuned.values.items() if not np.array_equal(value, bundle.start[name])}
    values = TunedValues(tuned.values, frozenset(changed), bundle.start, bundle.target.name, held.labels, after)
    others = write_others(bundle.folder, part, bundle.manifest, values, predict, request.max_accuracy_drop)
    deployed = bundle.deployed.name
    if deployed in others.fresh:
        anew = judge_tuning(held.labels, before, others.fresh[deployed], names, request.max_recall_drop)
        if anew.kept:
            return _Result(anew, bundle.deployed, others.stale)
        others.stale[deployed] = anew.reason
        (part / deployed).unlink()
    return _Result(judgement, bundle.target, others.stale)


def _tune(bundle: TunableBundle, train: Samples, held: Samples, request: TuneRequest, thermostat: Thermostat) -> _Tuned:
    spec = bundle.spec
    features_model = load(bundle.folder / bundle.features.name, request.threads)
    shape = bundle.start[spec.head_weight].shape
    classes = len(bundle.manifest.labels)
    shipped = Head(bundle.start[spec.head_weight].reshape(classes, -1), bundle.start[spec.head_bias].reshape(classes))
    fit = fit_head(_features(features_model, bundle, train), train.labels, shipped, spec.head_ridge)
    predicted = fit.head.logits(_features(features_model, bundle, held)).argmax(axis=1)
    start = bundle.start | {
        spec.head_weight: fit.head.weight.reshape(shape),
        spec.head_bias: fit.head.bias.reshape(bundle.start[spec.head_bias].shape),
    }
    del features_model  # its memory is needed for the train step
    accuracy_head = float((predicted == held.labels).mean())
    variant, steps, choice = _iterate(bundle, (train, held.where(looked_at(held.labels))), start, request, thermostat)
    changed = {} if variant == HEAD or steps.diverged or steps.harmful else steps.values
    head = {name: start[name] for name in (spec.head_weight, spec.head_bias)}
    return _Tuned(head | changed, steps, variant, choice, accuracy_head)


def _iterate(
    bundle: TunableBundle,
    samples: tuple[Samples, Samples],
    start: dict[str, FloatArray],
    request: TuneRequest,
    thermostat: Thermostat,
) -> tuple[str, StepsResult, Choice]:
    """Run the largest size of the train step that fits memory and time; its name, its result, and all sizes.

    ``samples`` are those to learn from and those of the hold-out that are looked at. The smallest that fits the memory
    is never given up for time: it runs as many iterations as there is time for.
    """
    iterations = bundle.spec.iterations if request.iterations is None else request.iterations
    resident = rss_bytes()
    limit = request.memory_bytes or resident + int(MEMORY_SHARE * available_bytes())
    choice = Choice(variants_of(bundle.spec), resident, limit, iterations, request.skip)
    nothing = (HEAD, StepsResult(start, 0, 0.0, 0.0, diverged=False), choice)
    if iterations < 1:
        return nothing
    deadline = time.monotonic() + request.max_seconds
    fitting = choice.fitting()
    for variant in fitting:
        is_last, left = variant is fitting[-1], deadline - time.monotonic()
        if not is_last and choice.seconds(variant) > left:
            choice.notes[variant.name] = f"would take longer than the {left:.0f} s that are left"
            continue
        write_atomic(bundle.folder / TRYING_NAME, variant.name.encode())
        look = _look(bundle, start, samples[1], request.threads)
        plan = replace(_plan(bundle, variant, request, not is_last, left), thermostat=thermostat, look=look)
        steps = run_steps(plan, start, samples[0], np.random.default_rng(request.seed))
        choice.paces_s[variant.name] = steps.pace_s
        if not steps.too_slow:
            choice.notes[variant.name] = "taken: the largest that fits the memory and the time"
            (bundle.folder / TRYING_NAME).unlink()
            return variant.name, steps, choice
        choice.notes[variant.name] = f"too slow for the {left:.0f} s that were left"
    return nothing


def _look(bundle: TunableBundle, start: Mapping[str, FloatArray], held: Samples, threads: int) -> Look:
    """Which samples of the hold-out the float32 ONNX file gets right with other parameters, which no file has yet."""
    path = bundle.folder / bundle.features.name
    places = [patch for patch in bundle.features.patches if patch.parameter in start]

    def right(values: Mapping[str, FloatArray]) -> NDArray[np.bool_]:
        model = load(path, threads, ("cpu",), patched(path, places, {**start, **values}))
        batches = [held.images[n : n + _BATCH] for n in range(0, len(held), _BATCH)]
        inputs = (to_input(batch, bundle.manifest.preprocessing, model.layout) for batch in batches)
        found = np.concatenate([model.run(batch).argmax(axis=1) for batch in inputs])
        return np.asarray(found == held.labels)

    return right


def _plan(
    bundle: TunableBundle, variant: TrainVariant, request: TuneRequest, may_give_up: bool, max_seconds: float
) -> StepsPlan:
    return StepsPlan(
        graph=bundle.folder / variant.graph,
        spec=bundle.spec,
        variant=variant,
        may_give_up=may_give_up,
        preprocessing=bundle.manifest.preprocessing,
        classes=len(bundle.manifest.labels),
        iterations=bundle.spec.iterations if request.iterations is None else request.iterations,
        max_seconds=max_seconds,
        threads=request.threads,
        trained={patch.parameter for patch in bundle.target.patches},
    )


def _features(model: OnnxModel, bundle: TunableBundle, samples: Samples) -> FloatArray:
    spec = bundle.manifest.preprocessing
    batches = [samples.images[n : n + _BATCH] for n in range(0, len(samples), _BATCH)]
    return np.concatenate([model.run_outputs(to_input(batch, spec, model.layout), [FEATURES])[0] for batch in batches])


def _open(bundle: TunableBundle, artifact: Artifact, folder: Path, request: TuneRequest) -> LoadedModel:
    return open_model(folder / artifact.name, artifact, request.threads, bundle.manifest.artifacts, request.providers)


def _predict(model: LoadedModel, bundle: TunableBundle, samples: Samples) -> NDArray[np.int64]:
    """The best classes [n], frame by frame as on the line."""
    spec = bundle.manifest.preprocessing
    batches = (to_input(image[None], spec, model.layout) for image in samples.images)
    return np.array([int(model.run(batch)[0].argmax()) for batch in batches], np.int64)


def _seal(
    bundle: TunableBundle,
    part: Path,
    values: Mapping[str, FloatArray],
    judgement: Judgement,
    request: TuneRequest,
    holdout: int,
) -> str:
    """Write the values and the seal into the part folder and return the seal's digest."""
    archive = io.BytesIO()
    np.savez(archive, **dict(values))  # type: ignore[arg-type]
    write_atomic(part / VALUES_NAME, archive.getvalue())
    seal = Seal(
        line=request.line,
        device=request.device,
        parent=bundle.manifest.digest,
        artifacts={a.name: sha256_file(part / a.name) for a in bundle.manifest.artifacts if (part / a.name).is_file()},
        values=sha256_file(part / VALUES_NAME),
        accuracy_before=judgement.accuracy_before,
        accuracy_after=judgement.accuracy_after,
        holdout=holdout,
    )
    signed = sign_seal(seal, load_or_create_key(Path(request.state_dir)))
    write_atomic(part / SEAL_NAME, signed.encode())
    return signed.digest


def _report(tuned: _Tuned, judgement: Judgement, counts: tuple[int, int], seconds: float) -> TuneReport:
    reason = judgement.reason
    if tuned.steps.diverged:
        reason += "; the iterations diverged, so only the head was changed"
    elif tuned.steps.harmful:
        reason += "; the iterations made the loss larger, so only the head was changed"
    return TuneReport(
        iterations=tuned.steps.iterations,
        seconds=seconds,
        samples=counts[0],
        holdout=counts[1],
        accuracy_before=judgement.accuracy_before,
        accuracy_head=tuned.accuracy_head,
        accuracy_after=judgement.accuracy_after,
        loss_first=tuned.steps.loss_first,
        loss_last=tuned.steps.loss_last,
        peak_rss_bytes=peak_rss_bytes(),
        kept=judgement.kept,
        reason=reason,
        worst_recall_drop=judgement.worst_recall_drop,
        bound=tuned.steps.bound,
        best_iteration=tuned.steps.best,
        variant=tuned.variant,
        variants=tuned.choice.costs(),
    )


def _not_tuned(request: TuneRequest, started: float, found: Gathered, reason: str) -> TuneOutcome:
    holdout = int(found.samples.holdout.sum())
    report = TuneReport(
        iterations=0,
        seconds=time.perf_counter() - started,
        samples=len(found.samples) - holdout,
        holdout=holdout,
        accuracy_before=0.0,
        accuracy_head=0.0,
        accuracy_after=0.0,
        loss_first=0.0,
        loss_last=0.0,
        peak_rss_bytes=peak_rss_bytes(),
        kept=False,
        reason=f"not tuned: {reason}",
        sources=found.counts(),
    )
    return TuneOutcome(report, request.artifact, "")
