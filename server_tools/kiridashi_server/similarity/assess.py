"""Measure one of the bank's tasks as if it were new: its row of the utility matrix, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.compose.calibration import on_one_scale
from kiridashi_server.compose.composition import robust_mean
from kiridashi_server.compose.selection import select
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import RecoverSettings, recover_cut
from kiridashi_server.recover.ridge import left_out_accuracy
from kiridashi_server.similarity.assessment import DEFAULT_SETTINGS, UNIFORM, Assessment, AssessSettings
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.evidence import EvidenceSettings, tilted_weights, usable_records
from kiridashi_server.similarity.masks import MaskedBackbone, describe
from kiridashi_server.similarity.measure import MEASURES, find_measure, what_is_missing
from kiridashi_server.tasks.task import Samples, Task

Keep = Callable[[Assessment], None]

_FEWEST_RECORDS = 2


def assess(
    backbone: Backbone,
    task: Task,
    records: Sequence[Record],
    settings: AssessSettings = DEFAULT_SETTINGS,
    *,
    known: Assessment | None = None,
    keep: Keep,
    progress: Progress = no_progress,
) -> Assessment:
    """Assess a task by all records but its own.

    Costs, beside learning the task's own scores once, one repaired cut for every record and every measure, and one
    masked forward over the few samples for every record.

    Args:
        backbone: the dense model.
        task: one of the bank's tasks, with the splits ``train`` and ``val``; nothing else is touched.
        records: the bank's; those of its own task (same name or same samples) are not used.
        settings: how.
        known: what an earlier call has measured; only what is missing is measured.
        keep: is given the assessment after every cell.
        progress: told about cells.

    Raises:
        TaskError: a split is missing, or a class has too few samples.
        InputError: fewer than two other records of this backbone and layout.
    """
    usable, _ = usable_records(records, backbone.fingerprint, backbone.layout.digest)
    own = {r.id for r in usable if r.task == task.name or r.provenance.task_digest == task.digest}
    others = [record for record in usable if record.id not in own]
    if len(others) < _FEWEST_RECORDS:
        raise InputError(
            f"'{task.name}' cannot be assessed",
            why=f"the bank has {len(others)} records of other tasks for this backbone; {_FEWEST_RECORDS} are needed",
            next_step="learn more tasks: kiridashi bank learn",
        )
    found = known or blank(backbone, task, settings)
    found = found.changed(records=tuple(sorted(own)))
    work = _Work(backbone, task, others, settings)
    cells = work.missing(found)
    for done, cell in enumerate(cells, start=1):
        found = cell(found)
        keep(found)
        progress(done, len(cells))
    return found


def blank(backbone: Backbone, task: Task, settings: AssessSettings) -> Assessment:
    """The assessment of a task before anything is measured."""
    return Assessment(task.name, task.digest, backbone.fingerprint, backbone.layout.digest, settings)


Cell = Callable[[Assessment], Assessment]


class _Work:
    """The cells of one task."""

    def __init__(self, backbone: Backbone, task: Task, others: Sequence[Record], settings: AssessSettings) -> None:
        self._backbone = backbone
        self._classes = len(task.labels)
        self._few: Samples = task.split("train").few_shot(settings.per_class, settings.seed)
        self._validation = task.split("val")
        self._others = others
        self._settings = settings

    def missing(self, found: Assessment) -> list[Cell]:
        """What is still to be measured, in an order in which each cell has what it needs."""
        cells: list[Cell] = [] if found.own is not None else [self._own]
        cells += [self._alone(record) for record in self._others if record.id not in found.utilities]
        if found.compared != self._compared:
            return [*cells, self._compare, *(self._composed(name) for name in MEASURES)]
        return cells + [self._composed(name) for name in MEASURES if self._is_open(found, name)]

    @property
    def _compared(self) -> tuple[str, ...]:
        return tuple(sorted(record.id for record in self._others))

    def _is_open(self, found: Assessment, name: str) -> bool:
        return name in found.similarities and name not in found.composed

    def _own(self, found: Assessment) -> Assessment:
        settings = ScoreSettings(iterations=self._settings.iterations)
        seed = self._settings.seed
        scores = learn_scores(self._backbone, self._few, classes=self._classes, seed=seed, settings=settings)
        return found.changed(own=self._accuracy(scores.groups))

    def _alone(self, record: Record) -> Cell:
        return lambda found: found.changed(
            utilities={**found.utilities, record.id: self._accuracy(record.scores)},
        )

    def _compare(self, found: Assessment) -> Assessment:
        """Similarities by every measure and the statistics; compositions of other records are dropped."""
        settings = self._settings
        needs = {need for measure in MEASURES.values() for need in measure.needs}
        target = describe(
            self._backbone,
            self._few,
            self._classes,
            self._others,
            needs=needs,
            share=settings.share,
            seed=settings.seed,
        )
        similarities = {
            name: {r.id: measure.similarity(r, target) for r in self._others if not what_is_missing(measure, r, target)}
            for name, measure in MEASURES.items()
        }
        under = MaskedBackbone(self._backbone, self._few.images, settings.share).features(
            self._mean(similarities, UNIFORM)
        )
        return found.changed(
            compared=self._compared,
            similarities={name: values for name, values in similarities.items() if values},
            composed={},
            statistics=measure_statistics(target, under, self._classes, self._others),
        )

    def _composed(self, name: str) -> Cell:
        def work(found: Assessment) -> Assessment:
            if not self._is_open(found, name):  # no record has what the measure needs
                return found
            accuracy = self._accuracy(self._mean(found.similarities, name))
            return found.changed(composed={**found.composed, name: accuracy})

        return work

    def _mean(self, similarities: dict[str, dict[str, float]], name: str) -> ScoreMap:
        """The records' mean, tilted by the measure; a record that it cannot judge weighs as much as an average one."""
        judged = [record for record in self._others if record.id in similarities[name]]
        values = np.array([similarities[name][record.id] for record in judged])
        tilted = tilted_weights(values, self._settings.tilt, EvidenceSettings().influence_limit) * len(judged)
        weights = dict.fromkeys(self._compared, 1.0) | dict(zip((r.id for r in judged), tilted, strict=True))
        return mean_scores(self._others, np.array([weights[r.id] for r in self._others]) / len(self._others))

    def _accuracy(self, scores: ScoreMap) -> float:
        """Of the cut by these scores, repaired, with a ridge head from the few samples, on the validation samples."""
        backbone, settings = self._backbone, self._settings
        plan = select(scores, backbone.layout, backbone.costs, settings.share)
        steps = RecoverSettings(iterations=0)
        small = recover_cut(
            backbone, plan, self._few, classes=self._classes, settings=steps, seed=settings.seed
        ).model.eval()
        logits = run_batched(small, to_input(backbone, self._validation.images)).numpy()
        return float((logits.argmax(axis=1) == self._validation.labels).mean())


def mean_scores(records: Sequence[Record], weights: npt.NDArray[np.float64] | None = None) -> ScoreMap:
    """The winsorised mean of the records' scores, all on one scale; plain without weights (which sum to 1)."""
    votes = on_one_scale([record.scores for record in records], [record.kind == "learnt" for record in records])
    return robust_mean(votes, np.full(len(votes), 1 / len(votes)) if weights is None else weights)


def measure_statistics(
    target: Descriptor, masked: npt.NDArray[np.float32], classes: int, records: Sequence[Record]
) -> dict[str, float]:
    """:data:`~kiridashi_server.similarity.assessment.STATISTICS` of a task.

    Args:
        target: its few samples on the dense backbone.
        masked: their features under the mask of the bank's plain mean, float32 [N, D].
        classes: how many it has.
        records: the bank's, of this backbone and layout.
    """
    dense = left_out_accuracy(target.features, target.labels, classes)
    leep = find_measure("loo-leep")
    zero = leep.zero_point(target) or 0.0
    telling = [
        leep.similarity(record, target) - zero for record in records if not what_is_missing(leep, record, target)
    ]
    return {
        "dense": dense,
        "retained": left_out_accuracy(masked, target.labels, classes) - dense,
        "telling": float(np.mean(telling)) if telling else 0.0,
    }
