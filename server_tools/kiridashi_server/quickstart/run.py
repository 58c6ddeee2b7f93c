"""The stages of the quickstart, in order, each kept when it is finished."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import msgspec
import torch
from kiridashi.artifacts import write_atomic
from kiridashi.budget import Budget
from kiridashi.errors import InputError
from kiridashi.manifest import ArtifactKind

from kiridashi_server.amp.learning import ScoreSettings
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.learning import learn_record
from kiridashi_server.bank.record import Record
from kiridashi_server.bank.store import Bank
from kiridashi_server.cut_run import CutRequest, CutRun, too_busy
from kiridashi_server.export.artifacts import ALL_KINDS
from kiridashi_server.narrator import Narrator
from kiridashi_server.pipeline import Release
from kiridashi_server.quickstart.comparison import METHODS, Compared, Comparison
from kiridashi_server.quickstart.delivery import Delivered, deliver
from kiridashi_server.quickstart.prediction import Predicted, predict
from kiridashi_server.quickstart.summary import Findings, build_report
from kiridashi_server.recover.iterations import RecoverSettings
from kiridashi_server.report.page import write_page
from kiridashi_server.report.schema import Report
from kiridashi_server.settle.run import run_settling
from kiridashi_server.settle.store import Recovery, read_settled, recovery_for, save_settled
from kiridashi_server.stages import Workspace
from kiridashi_server.stock.pieces import Stock, StockSettings
from kiridashi_server.stock.run import run_stock
from kiridashi_server.stock.store import Making
from kiridashi_server.tasks import Task, load_shipped, shipped_names

LINE = "new-line"


class Settings(msgspec.Struct, frozen=True):
    """What the quickstart runs on; the defaults are the embedded ones.

    Attributes:
        task: the shipped task that is held out as the new line.
        bank: the past tasks; empty means all other shipped tasks.
        per_class: labelled samples per class of the new task, in styles that the device does not see.
        iterations: weight updates after the cut, for every method, unless something was settled.
        budget: the limits; ``None`` derives them from what the dense model is measured to need here.
        shares: further sizes of the comparison, as shares of the dense parameters.
        score_iterations: iterations of score learning for each past task.
        stock: how the stock is made that the line's model is cut out of.
        settle: have past tasks play new first, to settle how cuts are recovered; it takes some minutes.
        kinds: artifacts to export.
        image_size: side of the input in pixels.
        backbone: a known backbone's name.
        seed: of everything random.
    """

    task: str = "roles-b"
    bank: tuple[str, ...] = ()
    per_class: int = 8
    iterations: int = 20
    budget: Budget | None = None
    shares: tuple[float, ...] = (0.5, 0.15)
    score_iterations: int = 40
    stock: StockSettings = StockSettings(shares=(1.0, 0.45), iterations=120)
    settle: bool = False
    kinds: tuple[ArtifactKind, ...] = ALL_KINDS
    image_size: int = 64
    backbone: str = "efficientnet-lite0"
    seed: int = 0


QUICK = Settings(
    bank=("roles-a", "hands-a", "goods"),
    iterations=5,
    shares=(),
    score_iterations=6,
    stock=StockSettings(shares=(1.0, 0.45), iterations=4),
    kinds=("onnx-fp32",),
)
"""A smoke test of the whole loop: small numbers everywhere, the same path."""


class Learnt(msgspec.Struct, frozen=True):
    """The id of the record that a past task's learning put into the bank."""

    record: str


def run_quickstart(settings: Settings, out: Path, narrator: Narrator) -> Report:
    """Run every stage that is not finished yet in ``out``, and write ``report.json`` and ``report.html`` there.

    Raises:
        InputError: an unknown task, or the output folder cannot be used.
        StateError: another run works in the folder.
        KiridashiError: a stage failed; running again goes on there.
    """
    _check(settings)
    workspace = Workspace(out, narrator.stage)
    with workspace.locked():
        return _Quickstart(settings, workspace, narrator).run()


def _check(settings: Settings) -> None:
    known = shipped_names()
    unknown = [name for name in (settings.task, *settings.bank) if name not in known]
    if unknown:
        raise InputError(
            f"there is no shipped task '{unknown[0]}'", next_step=f"choose one of: {', '.join(sorted(known))}"
        )
    if settings.task in settings.bank:
        raise InputError(
            f"the task '{settings.task}' cannot be both held out and in the bank",
            next_step="hold another task out with --task, or leave --quick away",
        )


class _Quickstart:
    """One run: what it is given, and its stages in the order of :meth:`run`."""

    def __init__(self, settings: Settings, workspace: Workspace, narrator: Narrator) -> None:
        self._settings = settings
        self._workspace = workspace
        self._narrator = narrator

    def run(self) -> Report:
        # One thread: the same numbers on every machine, times that can be compared, and no spinning on a busy one.
        torch.set_num_threads(1)
        records = self._learn_bank()
        stock = self._make_stock(records)
        own, others = self._recoveries(records)
        cut = CutRun(self._request(records, stock, own), self._workspace, self._narrator.bar)
        tell = self._narrator.fact
        tell(own.reason)
        tell(cut.composed.explanation)
        tell(f"the dense model needs {cut.profile.dense.latency_p95_ms:.2f} ms (p95) here; the budget is {cut.budget}")
        if too_busy(cut.profile) and self._settings.budget is None:
            tell("this machine is too busy to judge a tail: the default budget leaves latency unlimited")
        planned = cut.planned
        tell(f"{planned.parameters / 1e6:.2f} M parameters stay; the binding limit is {planned.binding}")
        cut.exported  # noqa: B018 - runs the stages up to the bundle
        delivered = self._deliver(cut)
        predicted = self._predict(cut, delivered)
        compared = self._compare(cut, records, others.settings)
        self._narrator.stage("report", reused=False)
        findings = Findings(
            task=self._task,
            seed=self._settings.seed,
            records=records,
            cut=cut,
            line=LINE,
            delivered=delivered,
            predicted=predicted,
            compared=compared,
        )
        report = build_report(findings)
        folder = self._workspace.folder
        write_atomic(folder / "report.json", msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        write_page(report, folder / "report.html")
        return report

    @cached_property
    def _task(self) -> Task:
        return load_shipped(self._settings.task, self._settings.image_size, self._settings.seed)

    @cached_property
    def _backbone(self) -> Backbone:
        return Backbone.load(self._settings.backbone, image_size=self._settings.image_size)

    def _learn_bank(self) -> list[Record]:
        settings = self._settings
        names = settings.bank or tuple(name for name in shipped_names() if name != settings.task)
        score_settings = ScoreSettings(iterations=settings.score_iterations)
        records = []
        with Bank.open(self._workspace.folder / "bank") as bank:
            for name in names:
                task = load_shipped(name, settings.image_size, settings.seed)
                inputs = [self._backbone.fingerprint, task.digest, score_settings, settings.seed]
                work = self._learner(task, score_settings, bank)
                learnt = self._workspace.run(f"bank-{name}", inputs, work, Learnt)
                records.append(bank.get(learnt.record))
        return records

    def _learner(self, task: Task, settings: ScoreSettings, bank: Bank) -> Callable[[Path], Learnt]:
        def work(folder: Path) -> Learnt:
            with self._narrator.bar(task.name) as advance:
                record = learn_record(self._backbone, task, settings, self._settings.seed, progress=advance)
            bank.add(record)
            return Learnt(record.id)

        return work

    def _make_stock(self, records: list[Record]) -> Stock:
        settings, tasks = self._settings, self._past(records)
        return run_stock(
            self._workspace, self._backbone, tasks, records, settings.stock, settings.seed, self._narrator.bar
        )

    def _recoveries(self, records: list[Record]) -> tuple[Recovery, Recovery]:
        """How the line's cut is recovered, and how those of the other methods, which have no stock."""
        settings, tasks, folder = self._settings, self._past(records), self._workspace.folder / "settled"
        if settings.settle:
            workspace, bar = Workspace(folder), self._narrator.bar
            self._narrator.stage("settle", reused=False)
            settled = run_settling(workspace, self._backbone, tasks, records, settings.stock, settings.seed, bar)
            save_settled(folder, settled)
        found, default = read_settled(folder), RecoverSettings(iterations=settings.iterations)
        made_from = {task.name: task.digest for task in tasks}
        making = Making(made_from, tuple(record.id for record in records), settings.stock, settings.seed, 0.0)
        return recovery_for(found, self._backbone, making, default), recovery_for(found, self._backbone, None, default)

    def _past(self, records: list[Record]) -> list[Task]:
        return [load_shipped(record.task, self._settings.image_size, self._settings.seed) for record in records]

    def _request(self, records: list[Record], stock: Stock, recovery: Recovery) -> CutRequest:
        settings, task = self._settings, self._task
        return CutRequest(
            backbone=self._backbone,
            records=records,
            samples=task.split("train").few_shot(settings.per_class, settings.seed),
            calibration=task.split("val"),
            release=Release(LINE, 1, task.name, task.labels),
            budget=settings.budget,
            recover=recovery.settings,
            recovery=recovery.reason,
            stock=stock,
            kinds=settings.kinds,
            seed=settings.seed,
        )

    def _deliver(self, cut: CutRun) -> Delivered:
        folder = self._workspace.folder

        def work(_: Path) -> Delivered:
            return deliver(cut.bundle, LINE, self._task, folder / "server", folder / "device", self._narrator.fact)

        return self._workspace.run("deliver", [cut.exported, self._task.digest], work, Delivered)

    def _predict(self, cut: CutRun, delivered: Delivered) -> Predicted:
        artifact, device_dir = delivered.line(LINE).artifact, self._workspace.folder / "device"

        def work(_: Path) -> Predicted:
            return predict(self._task, LINE, cut.bundle, artifact, device_dir, self._settings.seed)

        return self._workspace.run("predict", [delivered, self._task.digest], work, Predicted)

    def _compare(self, cut: CutRun, records: list[Record], others: RecoverSettings) -> list[Compared]:
        comparison = Comparison(cut, records, self._task, others, self._narrator.bar)
        sizes = {cut.planned.parameters, *(int(share * comparison.dense_parameters) for share in self._settings.shares)}
        request = cut.request
        inputs = [cut.planned, request.samples.digest, request.recover, others, self._task.digest, request.stock_digest]
        results = []
        for size in sorted(sizes, reverse=True):
            for method in METHODS:
                name = f"compare-{method.replace(' ', '-')}-{size}"
                work = comparison.work(method, size)
                results.append(self._workspace.run(name, [*inputs, method, size], work, Compared))
        return results
