"""Compare a new task with the bank: similarities, weights, and a verdict that rests on tasks that played new.

Where enough of the bank's tasks are assessed, the measure is chosen and the verdict calibrated on them. Otherwise all
records weigh the same, and the verdict follows the rule of :mod:`~kiridashi_server.similarity.evidence`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.assess import mean_scores, measure_statistics
from kiridashi_server.similarity.assessment import (
    STATISTICS,
    UNIFORM,
    Assessment,
    gains,
    statistics_of,
    usable_assessments,
)
from kiridashi_server.similarity.choice import choose_measure
from kiridashi_server.similarity.conformal import (
    DEFAULT_SETTINGS,
    VerdictSettings,
    calibrate_gains,
    tasks_needed,
    verdict,
)
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.evidence import Evidence, EvidenceSettings, usable_records, weigh
from kiridashi_server.similarity.masks import MASKED_SHARE, MaskedBackbone, describe
from kiridashi_server.similarity.measure import DEFAULT_MEASURE, find_measure
from kiridashi_server.tasks.task import Samples


def compare(
    backbone: Backbone,
    records: Sequence[Record],
    samples: Samples,
    *,
    assessments: Sequence[Assessment] = (),
    measure: str | None = None,
    settings: VerdictSettings = DEFAULT_SETTINGS,
) -> Evidence:
    """What the bank has to say about a new task, from its few labelled samples.

    Args:
        backbone: the dense model.
        records: the bank's records, of any backbone; those of others are left out and named.
        samples: the new task's.
        assessments: of the bank's tasks, of any backbone and settings.
        measure: show this one's similarities. By default it is the one that the assessments choose, else LOO-LEEP.
        settings: of the calibrated verdict.
    """
    assessed = usable_assessments(assessments, backbone.fingerprint, backbone.layout.digest)
    needed = tasks_needed(settings.alpha)
    usable, _ = usable_records(records, backbone.fingerprint, backbone.layout.digest)
    if len(assessed) < needed:
        evidence, _ = _weighed(backbone, records, usable, samples, measure, UNIFORM, EvidenceSettings(), MASKED_SHARE)
        note = f"uncalibrated: {len(assessed)} of the bank's tasks are assessed, a calibrated verdict needs {needed}"
        return dataclasses.replace(evidence, reason=f"{evidence.reason} ({note})")
    choice, how = choose_measure(assessed), assessed[0].settings
    weights = EvidenceSettings(tilt=0.0 if measure or choice.measure == UNIFORM else how.tilt)
    evidence, target = _weighed(backbone, records, usable, samples, measure, choice.measure, weights, how.share)
    if not usable:
        return evidence
    masked = MaskedBackbone(backbone, samples.images, how.share).features(mean_scores(usable))
    known = measure_statistics(target, masked, _classes(samples), usable)
    calibration = calibrate_gains(gains(assessed), statistics_of(assessed), settings)
    found = verdict(calibration, np.array([known[name] for name in STATISTICS]), settings)
    return dataclasses.replace(evidence, verdict=found.name, reason=f"{found.reason}; {choice.reason}")


def _weighed(
    backbone: Backbone,
    records: Sequence[Record],
    usable: Sequence[Record],
    samples: Samples,
    asked: str | None,
    chosen: str,
    settings: EvidenceSettings,
    share: float,
) -> tuple[Evidence, Descriptor]:
    """Evidence by the measure asked for, else the chosen one, else the default; and the target it was made from."""
    measure = find_measure(asked or (chosen if chosen != UNIFORM else DEFAULT_MEASURE))
    target = describe(backbone, samples, _classes(samples), usable, needs=measure.needs, share=share)
    evidence = weigh(
        records,
        target,
        measure,
        fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        settings=settings,
    )
    return evidence, target


def _classes(samples: Samples) -> int:
    return int(samples.labels.max()) + 1
