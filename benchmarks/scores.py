"""How stable are scores? The same tasks learnt with several seeds, and the ranks of their units compared.

A seed draws batches, augmentation and shares, and the samples that a task is rendered with. Spearman's rank correlation
is taken over all units of the network at once, as a cut ranks them, and within every group. Beside it: scores of
different tasks, which is what agreement by the network alone amounts to, and first-order (Taylor) scores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import TypeAlias

import numpy as np
import torch
from kiridashi_server.amp.learning import learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.amp.taylor import taylor_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.compose.selection import select
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.similarity.score_ranks import spearman
from kiridashi_server.tasks import Samples, Task

from benchmarks.oneshot_tasks import load_task, task_names
from benchmarks.report import Figure, Options, Report, options_parser, rounded, table

KEPT = 0.3
SEEDS = 3
Scored: TypeAlias = dict[tuple[str, int], ScoreMap]


def main(arguments: list[str] | None = None) -> int:
    """Learn, compare, print and write."""
    chosen = options_parser("scores", "rank correlation of scores over seeds").parse_args(arguments)
    torch.set_num_threads(1)
    report = Report("scores", Options(chosen.json, chosen.quick, chosen.seed))
    backbone = Backbone.load(image_size=64)
    names = task_names("development")[: 2 if chosen.quick else 6]
    lines = []
    for method, learn in METHODS.items():
        scored: Scored = {}
        for name in names:
            for seed in range(chosen.seed, chosen.seed + SEEDS):
                task = load_task(name, seed=seed)
                scored[name, seed] = learn(backbone, task.split("train"), task, seed)
                print(f"{method}: {name}, seed {seed}", file=sys.stderr, flush=True)
        rows = list(_rows(backbone, scored))
        report.rows += [rounded({"method": method, **row}) for row in rows]
        figures = _figures(method, rows)
        report.figures |= figures
        lines.append((method, *(f"{figure.value:.2f}" for figure in figures.values())))
    print(table(("scores", "seeds", "seeds, in groups", "same units", "tasks", "tasks, in groups"), lines))
    report.print_figures()
    report.write()
    return 0


def _learnt(backbone: Backbone, samples: Samples, task: Task, seed: int) -> ScoreMap:
    return learn_scores(backbone, samples, classes=len(task.labels), seed=seed).groups


def _taylor(backbone: Backbone, samples: Samples, task: Task, seed: int) -> ScoreMap:
    inputs = to_input(backbone, samples.images)
    head = fit_ridge_head(run_batched(backbone.program, inputs).numpy(), samples.labels, len(task.labels))
    labels, generator = torch.from_numpy(samples.labels), torch.Generator().manual_seed(seed)
    return taylor_scores(backbone.program, backbone.tracking, head, inputs, labels, generator=generator)


METHODS: Mapping[str, Callable[[Backbone, Samples, Task, int], ScoreMap]] = {"learnt": _learnt, "taylor": _taylor}


def _rows(backbone: Backbone, scored: Scored) -> list[dict[str, float | str]]:
    """Every pair of two seeds of a task, and of two tasks of one seed."""
    found: list[dict[str, float | str]] = []
    for (name, seed), (other, again) in combinations(scored, 2):
        if (name == other) == (seed == again):
            continue
        left, right = scored[name, seed], scored[other, again]
        found.append(
            {
                "pair": "seeds" if name == other else "tasks",
                "first": f"{name}/{seed}",
                "second": f"{other}/{again}",
                "spearman": spearman(_flat(left), _flat(right)),
                "in_groups": float(np.mean([spearman(left[group], right[group]) for group in left])),
                "same_units": _same_units(backbone, left, right),
            }
        )
    return found


def _flat(scores: ScoreMap) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate([np.asarray(scores[name], dtype=np.float64) for name in sorted(scores)])


def _same_units(backbone: Backbone, left: ScoreMap, right: ScoreMap) -> float:
    """The share of the units that one cut keeps which the other keeps too."""
    plans = [select(scores, backbone.layout, backbone.costs, KEPT) for scores in (left, right)]
    kept = [{(name, unit) for name, units in plan.kept.items() for unit in units} for plan in plans]
    return len(kept[0] & kept[1]) / max(len(kept[0]), len(kept[1]))


def _figures(method: str, rows: list[dict[str, float | str]]) -> dict[str, Figure]:
    def mean(pair: str, value: str) -> Figure:
        return Figure(float(np.mean([float(row[value]) for row in rows if row["pair"] == pair])), "correlation")

    return {
        f"spearman_seeds.{method}": mean("seeds", "spearman"),
        f"spearman_seeds_in_groups.{method}": mean("seeds", "in_groups"),
        f"same_units_seeds.{method}": Figure(mean("seeds", "same_units").value, "share"),
        f"spearman_tasks.{method}": mean("tasks", "spearman"),
        f"spearman_tasks_in_groups.{method}": mean("tasks", "in_groups"),
    }


if __name__ == "__main__":
    sys.exit(main())
