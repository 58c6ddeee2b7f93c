"""From the stages' results to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kiridashi.budget import Measurement, judge
from kiridashi.errors import StateError
from kiridashi.messages import LineState

from kiridashi_server.bank.record import Record
from kiridashi_server.budget.profile import ProfilePoint
from kiridashi_server.cut_run import CutRun, too_busy
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.quickstart.comparison import OWN, Compared
from kiridashi_server.quickstart.delivery import RECALL_POLICY, Delivered
from kiridashi_server.quickstart.prediction import Predicted
from kiridashi_server.report.schema import (
    BackboneEntry,
    BankEntry,
    DeliveryEntry,
    DenseEntry,
    DeviceEntry,
    MeasuredEntry,
    PlanEntry,
    Report,
    ResultEntry,
    StageEntry,
    TuneEntry,
)
from kiridashi_server.stages import machine
from kiridashi_server.tasks import Samples, Task, accuracy_interval, paired_difference_interval


@dataclass(frozen=True)
class Findings:
    """What all stages of a quickstart found."""

    task: Task
    seed: int
    records: Sequence[Record]
    cut: CutRun
    line: str
    delivered: Delivered
    predicted: Predicted
    compared: Sequence[Compared]

    @property
    def state(self) -> LineState:
        """What the device reported of the line."""
        return self.delivered.line(self.line)


def build_report(found: Findings) -> Report:
    """Everything that was found, as the report has it."""
    cut = found.cut
    backbone, composed = cut.request.backbone, cut.composed
    costs = backbone.costs
    dense_parameters = costs.parameters({})
    return Report(
        task=found.task.name,
        labels=found.task.labels,
        seed=found.seed,
        hardware=cut.profile.hardware,
        machine=machine(),
        backbone=BackboneEntry(backbone.name, backbone.fingerprint, dense_parameters, len(backbone.layout.groups)),
        bank=tuple(_bank_entry(record) for record in found.records),
        measure=composed.measure,
        verdict=composed.verdict,
        explanation=tuple(cut.explanation.split("; ")),
        evidence=composed.evidence,
        plan=_plan_entry(cut, costs),
        results=tuple(_result_entries(found.compared, found.task.split("test"), dense_parameters, found.seed)),
        artifacts=cut.exported.files,
        dropped=cut.exported.dropped,
        budget=cut.budget,
        measured=_measured_entry(found),
        dense=_dense_entry(cut.profile.dense),
        device=_device_entry(found),
        delivery=_delivery_entry(found),
        stages=tuple(StageEntry(one.name, one.seconds, one.reused) for one in cut.workspace.times),
        predictions=found.predicted.predictions,
        notes=tuple(_notes(found)),
    )


def _dense_entry(dense: ProfilePoint) -> DenseEntry:
    return DenseEntry(dense.memory_bytes, dense.file_bytes, dense.latency_p50_ms, dense.latency_p95_ms)


def _bank_entry(record: Record) -> BankEntry:
    return BankEntry(record.task, record.provenance.seconds, record.outcomes["dense"], record.samples)


def _result_entries(compared: Sequence[Compared], test: Samples, dense_parameters: int, seed: int) -> list[ResultEntry]:
    """Every method at every size with intervals clustered by drawing, and the one-shot cut's gain over it."""
    own = {result.size: np.array(result.right) for result in compared if result.method == OWN}
    entries = []
    for result in compared:
        right = np.array(result.right)
        interval = accuracy_interval(right, test.clusters, seed)
        gain = paired_difference_interval(own[result.size], right, test.clusters, seed)
        entries.append(
            ResultEntry(
                method=result.method,
                kept_params=result.parameters,
                kept_share=result.parameters / dense_parameters,
                macs=result.macs,
                iterations=result.iterations,
                extra_iterations=result.extra_iterations,
                accuracy=interval.mean,
                low=interval.low,
                high=interval.high,
                seconds=result.seconds,
                gain=gain.mean,
                gain_low=gain.low,
                gain_high=gain.high,
            )
        )
    return entries


def _plan_entry(cut: CutRun, costs: CostModel) -> PlanEntry:
    planned, layout = cut.planned, cut.request.backbone.layout
    return PlanEntry(
        groups=len(layout.groups),
        kept_units=sum(cut.plan.counts.values()),
        units=sum(layout.sizes.values()),
        params_before=costs.parameters({}),
        params_after=planned.parameters,
        binding=planned.binding,
        corrections=planned.corrections,
        macs_before=costs.macs({}),
        macs_after=planned.macs,
    )


def _measured_entry(found: Findings) -> MeasuredEntry:
    """The device's own measurement of the file it runs, with its verdict."""
    measured = found.state.measured or found.cut.planned.measured
    if measured is None:
        raise StateError("the device reported no measurement", next_step="kiridashi-agent status")
    fields = {name: getattr(measured, name) for name in Measurement.__struct_fields__}
    within = judge(found.cut.budget, measured).within
    return MeasuredEntry(**fields, verdict="within" if within else "exceeded", artifact=found.state.artifact)


def _device_entry(found: Findings) -> DeviceEntry:
    tune, reported = found.state.tune, found.delivered.reported
    measured = found.state.measured.memory_bytes if found.state.measured else 0
    return DeviceEntry(
        modules_forbidden_loaded=reported.modules_forbidden_loaded,
        idle_rss_bytes=reported.idle_rss_bytes,
        peak_rss_bytes=max(measured, tune.peak_rss_bytes if tune else 0),
        tune=None
        if tune is None
        else TuneEntry(
            iterations=tune.iterations,
            seconds=tune.seconds,
            samples=tune.samples,
            holdout=tune.holdout,
            accuracy_before=tune.accuracy_before,
            accuracy_head=tune.accuracy_head,
            accuracy_after=tune.accuracy_after,
            kept=tune.kept,
            reason=tune.reason,
        ),
        test_accuracy_delivered=found.predicted.accuracy_delivered,
        test_accuracy_active=found.predicted.accuracy_active,
        model_digest=found.predicted.model_digest,
    )


def _delivery_entry(found: Findings) -> DeliveryEntry:
    way = found.state.delivery
    return DeliveryEntry(
        bytes=way.bytes if way else 0,
        seconds=way.seconds if way else 0.0,
        chunks=way.chunks if way else 0,
        resumed=way.resumed_chunks if way else 0,
        broker=found.delivered.broker_kind,
    )


def _notes(found: Findings) -> list[str]:
    notes = [
        found.delivered.broker,
        "The one-shot cut is made out of the stock: the backbone, pruned step by step on the past tasks, once for all "
        "lines. The other methods cut the backbone as it is.",
    ]
    if any(one.method == "uniform bank" and one.same_as_own for one in found.compared):
        notes.append(
            "The one-shot cut keeps the units that the uniform bank keeps: similarity decided that the bank may be "
            "used, and its weights are equal, because tilting them has not yet shown that it helps. What sets the two "
            "apart is the stock."
        )
    if too_busy(found.cut.profile):
        notes.append(
            "Other work disturbed the measurements: the dense model's p95 is more than three times its median. "
            "Latencies of this run say little about the models; run it again on a quiet machine."
        )
    notes.append(
        f"Local tuning was judged with max_recall_drop = {RECALL_POLICY:g}: accuracy on the hold-out alone decides. "
        "A device's default is 0.1."
    )
    styles = sorted({source.partition("/")[0] for source in found.task.split("test").sources})
    notes.append(f"The test images are in the style {', '.join(styles)}, which neither the bank nor the cut saw.")
    return notes
