"""What the agent has done by child processes: probing, measuring and tuning a bundle, interleaving, watching for drift.

The resident agent stays small: this module imports neither numpy nor a runtime. Every function blocks until the child
has ended (call it from a worker thread), and either returns the child's result or raises: the child's own
:class:`~kiridashi.errors.KiridashiError`, or a :class:`~kiridashi_agent.process.JobError` when it crashed, hung or
reached its memory limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec
from kiridashi import errors
from kiridashi.budget import MIB, Measurement
from kiridashi.drift.report import LineDrift
from kiridashi.errors import ExitCode, KiridashiError
from kiridashi.messages import AccuracyCheck, TuneReport
from kiridashi.runtime.protocol import PREFERENCE, Provider
from kiridashi.slots import LineSlots, Place

from kiridashi_agent.cage import MemoryLimit
from kiridashi_agent.child import Call, Fault, Reply
from kiridashi_agent.process import JobCrashedError, JobError, Limits, MemoryLimitError, over_memory, run_child

Shape = tuple[int, ...]
TUNE_NICE = 10
TRYING_NAME = "tuned.trying"
"""File in the slot that says which size of the train step is being run, for the case that it does not fit."""
TURN = 6
"""Predictions in a row when models take turns; from the fifth on they are as quick as in steady serving."""
RESERVED_BYTES = 64 * 1024 * 1024
"""What a child may reserve over its limit without using it, where the kernel counts reservations (``RLIMIT_DATA``).

Thread stacks and the buffers of the linear algebra library come to about 50 MiB that are never touched; the resident
set itself is watched from outside.
"""
PROBE_LIMITS = Limits(seconds=120.0)
MEASURE_LIMITS = Limits(seconds=120.0)
TUNE_LIMITS = Limits(seconds=900.0)
WATCH_LIMITS = Limits(seconds=120.0, memory_bytes=192 * MIB)


class AccuracyRequest(msgspec.Struct, frozen=True):
    """Compare one artifact of a bundle folder with the bundle's float file.

    ``samples`` is a folder of labelled samples (empty: none), beside the frames of ``line`` that people named. Their
    hold-out decides; without one, agreement on the known inputs does. ``max_drop`` is the share of frames that may be
    lost.
    """

    state_dir: str
    line: str
    folder: str
    artifact: str
    samples: str = ""
    threads: int = 1
    providers: tuple[Provider, ...] = PREFERENCE
    max_drop: float = 0.05


class ProbeRequest(msgspec.Struct, frozen=True):
    """Check one artifact of a bundle folder against the bundle's known inputs and outputs."""

    folder: str
    artifact: str
    threads: int = 1
    providers: tuple[Provider, ...] = PREFERENCE


class ProbeReport(msgspec.Struct, frozen=True):
    """How closely this device reproduced the known outputs; see :mod:`kiridashi_agent.probe` for the rule."""

    artifact: str
    images: int
    max_abs_diff: float
    tolerance: float
    top1_agreement: float


class MeasureRequest(msgspec.Struct, frozen=True):
    """Measure one artifact of a bundle folder, or with an empty ``artifact`` the model file ``folder`` itself.

    ``runs`` predictions are timed at least and ``max_runs`` at most; in between, timing stops after ``seconds``.
    Of a model file, ``shapes`` are those of its inputs, by name (an empty name is that of the only one), and ``bare``
    times the runtime's call alone, whatever the model is.
    """

    folder: str
    artifact: str = ""
    threads: int = 1
    providers: tuple[Provider, ...] = PREFERENCE
    shapes: dict[str, Shape] = {}
    bare: bool = False
    warmup: int = 10
    runs: int = 100
    max_runs: int = 2000
    seconds: float = 2.0
    memory_limit: MemoryLimit = "none"


class InterleaveRequest(msgspec.Struct, frozen=True):
    """Time the model files ``graphs`` of a folder against each other: all are loaded, and they take turns.

    A turn is ``turn`` predictions in a row. Rounds of turns go on until ``seconds`` have passed, loading included (but
    there are at least two), or until ``max_rounds`` are done. With ``compare`` the ratios to the first one are worked
    out, each with an interval.
    """

    folder: str
    graphs: tuple[str, ...]
    threads: int = 1
    providers: tuple[Provider, ...] = PREFERENCE
    shapes: dict[str, Shape] = {}
    bare: bool = False
    compare: bool = False
    seconds: float = 60.0
    turn: int = TURN
    max_rounds: int = 100
    seed: int = 0


Opening: TypeAlias = MeasureRequest | InterleaveRequest
"""How a model file is opened: threads, providers, shapes and bare."""


class Ratio(msgspec.Struct, frozen=True):
    """One model's time over another's, with an interval; see :mod:`kiridashi_agent.ratios`."""

    value: float
    low: float
    high: float


class Interleaved(msgspec.Struct, frozen=True):
    """The quiet time of each graph of a request, milliseconds; see :mod:`kiridashi_agent.interleave`.

    ``ratios`` has one for each graph but the first, if they were asked for.
    """

    quiet_ms: dict[str, float]
    rounds: int
    notes: tuple[str, ...] = ()
    ratios: tuple[Ratio, ...] = ()


class TuneRequest(msgspec.Struct, frozen=True):
    """Tune the bundle in a slot on local samples: the folder ``samples`` (empty: none), the files and folders ``given``
    for this once, the line's named frames, and what is kept from earlier tunings.

    ``state_dir``, ``line`` and ``slot`` name the slot; ``artifact`` is the file that would be deployed untuned, and
    ``serving`` the folder of the tuned one that serves now, if one does: that has to be beaten then. The bundle's
    ``onnx-fp32`` file, train step and train state are needed beside it. ``iterations`` overrides the manifest's;
    ``max_seconds`` and ``max_celsius`` bound the iterations; ``max_recall_drop`` is the share of its recall that no
    class may lose, beyond what the size of the hold-out leaves open (:mod:`kiridashi_agent.gate`). ``memory_bytes`` is
    what the child may use, as far as there is a limit; ``skip`` names sizes of the train step that went over it.
    ``max_accuracy_drop`` is the share of frames that a smaller file may lose against the tuned float32 one.
    The hold-out is predicted with ``providers``, as the line predicts.
    """

    state_dir: str
    line: str
    slot: Place
    artifact: str
    samples: str
    device: str
    seed: int = 0
    threads: int = 1
    iterations: int | None = None
    max_seconds: float = 300.0
    max_recall_drop: float = 0.1
    given: tuple[str, ...] = ()
    serving: str = ""
    max_celsius: float = 75.0
    memory_bytes: int | None = None
    skip: tuple[str, ...] = ()
    providers: tuple[Provider, ...] = PREFERENCE
    max_accuracy_drop: float = 0.05


class TuneOutcome(msgspec.Struct, frozen=True):
    """What tuning did. When ``report.kept``, activate ``artifact`` with ``tuned=True`` and ``model_digest``.

    ``artifact`` may differ from the request's: where a smaller file cannot be made anew, or loses too much by it, its
    float32 sibling is used instead and has to be measured against the budget.
    """

    report: TuneReport
    artifact: str
    model_digest: str


class ClassSurvey(msgspec.Struct, frozen=True):
    """A class's samples to learn from and held out.

    ``refused_from`` is how many of its hold-out samples have to be lost for the gate to refuse a tuned model; ``None``
    if they are too few for that.
    """

    learn: int
    holdout: int
    refused_from: int | None


class Survey(msgspec.Struct, frozen=True):
    """What a tuning would use. ``shortage`` says why it could not be judged, empty if it could."""

    classes: dict[str, ClassSurvey]
    sources: dict[str, int]
    shortage: str


class WatchRequest(msgspec.Struct, frozen=True):
    """Move the drift watches of ``lines`` on; each with how many frames its own reference takes."""

    state_dir: str
    lines: dict[str, int]


class WatchOutcome(msgspec.Struct, frozen=True):
    """Where the watch of each line is, and for lines that could not be looked at, why."""

    lines: dict[str, LineDrift]
    failed: dict[str, str] = {}


Result = TypeVar("Result", ProbeReport, AccuracyCheck, Measurement, Interleaved, TuneOutcome, Survey, WatchOutcome)


def probe(request: ProbeRequest, limits: Limits = PROBE_LIMITS) -> ProbeReport:
    """Check known inputs against known outputs on this hardware.

    Raises:
        BundleError: the outputs differ, or the bundle is damaged: reject it.
        RuntimeUnavailableError: the artifact's runtime is not installed.
        JobError: the child crashed, hung or reached its memory limit.
    """
    subject = f"probing {request.artifact} in {request.folder}"
    return _run("probe", request, ProbeReport, limits, subject)


def check_accuracy(request: AccuracyRequest, limits: Limits = PROBE_LIMITS) -> AccuracyCheck:
    """Compare an artifact's accuracy with the float file's; a loss is a result, not an error.

    Raises:
        BundleError: the bundle is damaged, or has no float file to compare with.
        RuntimeUnavailableError: the artifact's runtime is not installed.
        JobError: the child crashed, hung or reached its memory limit.
    """
    subject = f"checking the accuracy of {request.artifact} in {request.folder}"
    return _run("accuracy", request, AccuracyCheck, limits, subject)


def measure(request: MeasureRequest, limits: Limits = MEASURE_LIMITS) -> Measurement:
    """Measure load time, latency and peak memory in a fresh process.

    ``limits.memory_bytes`` protects the device; give it headroom over the budget, or a model a little over the budget
    is killed instead of measured. ``Measurement.memory_limit`` says what the kernel enforced beside the watch on the
    child's resident set.

    Raises:
        BundleError, InputError: the artifact or file cannot be used.
        RuntimeUnavailableError: its runtime is not installed.
        JobError: the child crashed, hung or reached its memory limit.
    """
    subject = f"measuring {request.artifact + ' in ' if request.artifact else ''}{request.folder}"
    return _run("measure", request, Measurement, limits, subject)


def interleave(request: InterleaveRequest, limits: Limits) -> Interleaved:
    """Time several model files against each other in one fresh process.

    Raises: as :func:`measure`.
    """
    subject = f"measuring {len(request.graphs)} files in {request.folder or 'one process'}"
    return _run("interleave", request, Interleaved, limits, subject)


def tune(request: TuneRequest, limits: Limits = TUNE_LIMITS) -> TuneOutcome:
    """Tune on local samples and validate on the local hold-out; files are left in the slot only when kept.

    A worse model, too few samples, or diverging iterations are results (``report.kept`` is false, with the reason),
    not errors. When the child reaches its memory limit during the iterations, it is started again without the size of
    the train step that did not fit.

    Raises:
        InputError: the samples cannot be read.
        BundleError: the bundle has no train step, or its files are damaged.
        StateError: the slot's tuned files are in use.
        JobError: the child crashed, hung or reached its memory limit; the slot is as before.
    """
    subject = f"tuning line {request.line} in slot {request.slot}"
    request = msgspec.structs.replace(request, memory_bytes=limits.memory_bytes)
    trying = LineSlots(Path(request.state_dir), request.line).folder(request.slot) / TRYING_NAME
    while True:
        try:
            return _run("tune", request, TuneOutcome, limits, subject, nice=TUNE_NICE)
        except JobError as error:
            failed = trying.read_text() if trying.is_file() else ""
            trying.unlink(missing_ok=True)
            if not isinstance(error, MemoryLimitError) or not failed or failed in request.skip:
                error.exit_code = ExitCode.TUNE
                raise
            request = msgspec.structs.replace(request, skip=(*request.skip, failed))


def survey(request: TuneRequest, limits: Limits = TUNE_LIMITS) -> Survey:
    """Look at the samples of a tuning of the bundle in ``request.slot``; changes nothing.

    Raises:
        InputError, StateError: the samples cannot be read.
        BundleError: the slot has no bundle.
        JobError: the child crashed, hung or reached its memory limit.
    """
    return _run("survey", request, Survey, limits, f"reading the samples of line {request.line}")


def watch(request: WatchRequest, limits: Limits = WATCH_LIMITS) -> WatchOutcome:
    """Take what the lines have noted and hold it against their references.

    Raises:
        JobError: the child crashed, hung or reached its memory limit; what it had not written is done next time.
    """
    return _run("watch", request, WatchOutcome, limits, "the drift watch", nice=TUNE_NICE)


def _run(
    job: str,
    request: ProbeRequest | AccuracyRequest | MeasureRequest | InterleaveRequest | TuneRequest | WatchRequest,
    result: type[Result],
    limits: Limits,
    subject: str,
    nice: int = 0,
) -> Result:
    def compose(kind: MemoryLimit) -> bytes:
        body = msgspec.structs.replace(request, memory_limit=kind) if job == "measure" else request
        data_limit = limits.memory_bytes + RESERVED_BYTES if kind == "rlimit" and limits.memory_bytes else None
        return msgspec.json.encode(Call(msgspec.Raw(msgspec.json.encode(body)), data_limit, nice))

    arguments = ["-m", "kiridashi_agent.child", job]
    data, kind = run_child(arguments, compose, limits, subject)
    try:
        reply = msgspec.json.decode(data, type=Reply)
        if reply.fault is None:
            return msgspec.json.decode(reply.ok, type=result)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise JobCrashedError(f"{subject} failed", why=f"its reply cannot be read: {error}") from error
    if reply.fault.kind == "MemoryError":
        raise over_memory(subject, limits, f"an allocation failed ({kind})")
    raise _error(reply.fault)


def _error(fault: Fault) -> KiridashiError:
    """The child's error, as the class it was raised as, or a :class:`JobError` for a class unknown here."""
    kind = getattr(errors, fault.kind, JobError)
    if not (isinstance(kind, type) and issubclass(kind, KiridashiError)):
        kind = JobError
    return kind(fault.what, why=fault.why, next_step=fault.next_step)
