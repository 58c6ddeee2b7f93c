"""Learn everything that the bank keeps of one task."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.amp.taylor import taylor_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Provenance, Record
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.tasks.task import Task


def learn_record(
    backbone: Backbone,
    task: Task,
    settings: ScoreSettings | None = None,
    seed: int = 0,
    *,
    progress: Progress = no_progress,
) -> Record:
    """One task's record: learnt scores, first-order scores, head, feature moments and measured accuracies.

    Learns from the split ``train`` and measures on ``val`` where there is one; the device's splits are not touched.

    Raises:
        TaskError: the task has no split ``train``.
        InputError: its images have another size than the backbone's.
    """
    start = time.perf_counter()
    settings = settings or ScoreSettings()
    train, classes = task.split("train"), len(task.labels)
    validation = task.split("val") if "val" in task.splits else None
    scores = learn_scores(
        backbone, train, classes=classes, seed=seed, settings=settings, validation=validation, progress=progress
    )
    inputs = to_input(backbone, train.images)
    features = run_batched(backbone.program, inputs).numpy()
    head = fit_ridge_head(features, train.labels, classes, settings.ridge)
    generator = torch.Generator().manual_seed(seed)
    taylor = taylor_scores(
        backbone.program, backbone.tracking, head, inputs, torch.from_numpy(train.labels), generator=generator
    )
    masked = {f"masked_{share:.0%}": value for share, value in scores.masked_accuracy.items()}
    return Record(
        task=task.name,
        labels=task.labels,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        samples=len(train),
        scores=scores.groups,
        taylor=taylor,
        head_weight=head.weight,
        head_bias=head.bias,
        feature_mean=features.mean(axis=0),
        feature_variance=features.var(axis=0),
        outcomes={"dense": scores.dense_accuracy, **masked},
        provenance=Provenance(
            seed=seed,
            settings=dataclasses.asdict(settings),
            code_version=version("kiridashi"),
            task_digest=task.digest,
            seconds=time.perf_counter() - start,
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
