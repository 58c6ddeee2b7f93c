"""What is a tuned checkpoint worth, when the images that it was tuned on are gone?

``python -m benchmarks.checkpoints --json OUT [--quick] [--seed N]``. The backbone is tuned on a shipped task for 40
iterations, and a record is read off the result. EfficientNet-Lite0 is then cut to 30 % of its parameters for the same
task, by that record alone, by the sum of absolute tuned weights, by random scores and by the mean of other tasks'
learnt scores; all but the last take the values of the last in every group. Closed-form repair and a ridge head, no
iterations.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from kiridashi_server.amp.learning import learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.adding import record_from_model, weight_norms
from kiridashi_server.compose.calibration import on_one_scale
from kiridashi_server.compose.composition import robust_mean
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import tensors_of, weight_names
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from kiridashi_server.tasks import Task, load_shipped
from scipy.stats import spearmanr

from benchmarks.report import Figure, Report, parse_options, rounded, show, table

TASKS = ("sports", "gestures", "animals", "roles-a", "goods")
SHARE, RECORD, NORM, RANDOM, BANK = 0.3, "record", "sum |w|", "random", "other tasks"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the report; 1 if the record is no better than random scores."""
    options = parse_options("checkpoints", "worth of a tuned checkpoint without its data", arguments)
    report = Report("checkpoints", options)
    torch.set_num_threads(1)
    backbone = Backbone.load()
    tasks = [load_shipped(name, 64, options.seed) for name in TASKS[: 2 if options.quick else None]]
    learnt = {task.name: _learnt(backbone, task, options.seed) for task in tasks}
    for task in tasks:
        others = [scores for name, scores in learnt.items() if name != task.name]
        level = robust_mean(others, np.full(len(others), 1 / len(others)))
        candidates = _candidates(backbone, task, options.seed)
        for name, scores in {**candidates, BANK: level}.items():
            vote = scores if name == BANK else on_one_scale([level, scores], [True, False])[1]
            found = {"task": task.name, "scores": name, "accuracy": _accuracy(backbone, task, vote, options.seed)}
            report.rows.append(rounded(found | {"correlation": _correlation(scores, learnt[task.name])}))
    report.figures.update(_figures(report.rows))
    cells = [
        [row["task"], row["scores"], show(row["accuracy"], ".1%"), show(row["correlation"], ".2f")]
        for row in report.rows
    ]
    print(table(("task", "scores", "accuracy", "correlation"), cells))
    report.print_figures()
    report.write()
    return int((report.figures["record_over_random"].value or 0) <= 0)


def _learnt(backbone: Backbone, task: Task, seed: int) -> ScoreMap:
    return learn_scores(backbone, task.split("train"), classes=len(task.labels), seed=seed).groups


def _candidates(backbone: Backbone, task: Task, seed: int) -> dict[str, ScoreMap]:
    """Scores that need no data, for a model tuned on the task."""
    tuned = recover_cut(
        backbone,
        Plan.full(backbone.layout),
        task.split("train"),
        classes=len(task.labels),
        settings=RecoverSettings(iterations=40),
        seed=seed,
    ).model.features
    own = tensors_of(tuned)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.safetensors"
        tensors = {name: own[name].detach().contiguous() for name in weight_names(tuned)}
        safetensors.torch.save_file(tensors, path)
        record = record_from_model(backbone, path, task.name)
    generator = np.random.default_rng(seed)
    random = {name: generator.random(size).astype(np.float32) for name, size in backbone.layout.sizes.items()}
    return {RECORD: record.scores, NORM: weight_norms(backbone.tracking, tensors), RANDOM: random}


def _accuracy(backbone: Backbone, task: Task, scores: ScoreMap, seed: int) -> float:
    plan = select(scores, backbone.layout, backbone.costs, SHARE)
    settings, classes = RecoverSettings(iterations=0), len(task.labels)
    made = recover_cut(backbone, plan, task.split("train"), classes=classes, settings=settings, seed=seed)
    return accuracy(made.model, backbone, task.split("test"))


def _correlation(scores: ScoreMap, learnt: ScoreMap) -> float:
    """Mean over groups of the rank correlation."""
    return float(np.mean([spearmanr(scores[name], values).statistic for name, values in learnt.items()]))


def _figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    by_scores = {name: [row for row in rows if row["scores"] == name] for name in (RECORD, NORM, RANDOM, BANK)}
    accuracies = {name: np.array([row["accuracy"] for row in chosen]) for name, chosen in by_scores.items()}
    figures = {}
    for name, slug in ((NORM, "sum_of_weights"), (RANDOM, "random"), (BANK, "other_tasks")):
        gain = 100 * (accuracies[RECORD] - accuracies[name])
        reach = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain))
        interval = (float(gain.mean() - reach), float(gain.mean() + reach))
        figures[f"record_over_{slug}"] = Figure(float(gain.mean()), "points", interval)
    correlation = float(np.mean([row["correlation"] for row in by_scores[RECORD]]))
    return figures | {"correlation_with_learnt": Figure(correlation, "rank correlation")}


if __name__ == "__main__":
    sys.exit(main())
