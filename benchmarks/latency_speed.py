"""Speed at equal accuracy: budget-solved cuts, beside a uniform ratio and torch-pruning's global pruning.

Each trial takes one of the shipped tasks as the new one and the others as its bank. All methods get the same few
samples and the same recovery. All cuts of a trial are measured together by the device's agent, anew in every run.
Learnt scores and recovered cuts are reused if code, data and settings are the same; a run says which were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from kiridashi_server.amp.learning import ScoreSettings, learn_scores
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.device import measure_probe_set
from kiridashi_server.budget.probes import (
    ProbeSettings,
    make_probe_set,
)
from kiridashi_server.budget.profile import Profile, ProfilePoint, fit_profile
from kiridashi_server.compose.composition import robust_mean
from kiridashi_server.graph.plan import Plan
from kiridashi_server.recover.iterations import RecoverSettings, correct, recover_cut
from kiridashi_server.stages import Workspace
from kiridashi_server.tasks import Samples, Task, load_shipped, shipped_names
from numpy.typing import NDArray

from benchmarks.equal_accuracy import Curve, Cuts, Statistic, Trial, advantage, better, estimate, speed
from benchmarks.global_pruning import IMPORTANCES
from benchmarks.latency_cuts import OURS, UNIFORM, Wanted, planned
from benchmarks.measured_cuts import measure_cuts
from benchmarks.report import Figure, Options

PIXELS = 64
PER_CLASS = 8
DENSE = "dense"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: new tasks, past tasks of each, shares of the dense latency, cuts of the profile, and the
    seconds of measuring a probe set.

    The full tasks are among those that no choice of the method was made with.
    """

    tasks: tuple[str, ...] = ("roles-b", "hands-b", "goods", "roles-a")
    past: int = 7
    shares: tuple[float, ...] = (0.75, 0.6, 0.45, 0.35, 0.25)
    probes: int = 24
    seconds: float = 60.0


QUICK = Sizes(tasks=("roles-b",), past=3, shares=(0.75, 0.5, 0.3), probes=12, seconds=45.0)


class Learnt(msgspec.Struct, frozen=True):
    """Scores by group."""

    scores: dict[str, list[float]]


class Recovered(msgspec.Struct, frozen=True):
    """Which test images a recovered cut got right, and the seconds of its recovery."""

    right: list[bool]
    seconds: float


def measure_speed(options: Options, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """Plan, recover and measure the cuts of all methods, and compare them at equal accuracy.

    Args:
        options: ``quick`` takes one task, three sizes and a small bank.
        folder: where scores, recovered cuts and exported files are kept.

    Returns:
        A row for each cut, and the figures.
    """
    sizes = QUICK if options.quick else Sizes()
    backbone = Backbone.load("efficientnet-lite0", image_size=PIXELS)
    profile = _profile(backbone, folder / "profile", sizes, options.seed)
    workspace = Workspace(folder)
    bench = _Bench(backbone, profile, workspace, sizes, options.seed)
    rows: list[dict[str, Any]] = []
    trials: dict[str, Trial] = {}
    with workspace.locked():
        for name in sizes.tasks:
            found, trials[name] = bench.trial(name)
            rows += found
    return rows, _figures(trials, options.seed)


def _profile(backbone: Backbone, folder: Path, sizes: Sizes, seed: int) -> Profile:
    probes = make_probe_set(backbone, folder, ProbeSettings(cuts=sizes.probes, seed=seed))
    (folder / "record").unlink(missing_ok=True)  # a benchmark measures anew
    return fit_profile(probes, measure_probe_set(folder, seconds=sizes.seconds), backbone.quantities)


@dataclass(frozen=True, eq=False)
class _Bench:
    backbone: Backbone
    profile: Profile
    workspace: Workspace
    sizes: Sizes
    seed: int

    def trial(self, name: str) -> tuple[list[dict[str, Any]], Trial]:
        """All cuts for one new task: rows, and what the comparison needs of them."""
        task = load_shipped(name, PIXELS, self.seed)
        samples = task.split("train").few_shot(PER_CLASS, self.seed)
        scores = self._bank_scores(name)
        wanted = Wanted(self.backbone, self.profile, samples, len(task.labels), scores)
        plans = {DENSE: {1.0: Plan.full(self.backbone.layout)}, **planned(wanted, self.sizes.shares)}
        rows: list[dict[str, Any]] = []
        right: dict[tuple[str, float], NDArray[np.bool_]] = {}
        for method, cuts in plans.items():
            for share, plan in cuts.items():
                recovered, reused = self._recovered(task, samples, plan, f"{name}-{method}-{share}")
                right[method, share] = np.array(recovered.right)
                rows.append(
                    {
                        "task": name,
                        "seed": self.seed,
                        "method": method,
                        "latency_share_asked": share,
                        "parameters": self.backbone.costs.parameters(plan.counts),
                        "macs": self.backbone.costs.macs(plan.counts),
                        "accuracy": float(right[method, share].mean()),
                        "seconds": recovered.seconds,
                        "reused": reused,
                    }
                )
        points = self._measured(name, [plan for cuts in plans.values() for plan in cuts.values()])
        for row, point in zip(rows, points, strict=True):
            row |= {"quiet_ms": point.quiet_ms, "p95_ms": point.latency_p95_ms}
        _say(f"{name}: {len(rows)} cuts measured, {sum(bool(row['reused']) for row in rows)} of them recovered earlier")
        return rows, _trial(task.split("test"), rows, right)

    def _bank_scores(self, new: str) -> ScoreMap:
        """The mean of the past tasks' scores."""
        names = [name for name in shipped_names() if name != new][: self.sizes.past]
        votes, reused = [], []
        for name in names:
            task = load_shipped(name, PIXELS, self.seed)
            work = partial(self._learn, task)
            inputs = [self.backbone.fingerprint, task.digest, asdict(ScoreSettings()), self.seed]
            learnt = self.workspace.run(f"scores-{name}", inputs, work, Learnt)
            votes.append({group: np.array(values, dtype=np.float32) for group, values in learnt.scores.items()})
            reused += [name] if self.workspace.times[-1].reused else []
        _say(f"{new}: scores of {len(names)} past tasks, learnt earlier: {', '.join(reused) or 'none'}")
        return robust_mean(votes, np.full(len(votes), 1 / len(votes)))

    def _learn(self, task: Task, _: Path) -> Learnt:
        scores = learn_scores(self.backbone, task.split("train"), classes=len(task.labels), seed=self.seed)
        return Learnt({name: values.tolist() for name, values in scores.groups.items()})

    def _recovered(self, task: Task, samples: Samples, plan: Plan, name: str) -> tuple[Recovered, bool]:
        """The plan's cut, recovered and tested, and whether that was done in an earlier run."""
        settings, test = RecoverSettings(), task.split("test")

        def work(_: Path) -> Recovered:
            done = recover_cut(
                self.backbone, plan, samples, classes=len(task.labels), settings=settings, seed=self.seed
            )
            return Recovered(correct(done.model, self.backbone, test).tolist(), done.seconds)

        inputs = [self.backbone.fingerprint, plan.to_json(), samples.digest, test.digest, asdict(settings), self.seed]
        recovered = self.workspace.run(f"cut-{name}", inputs, work, Recovered)
        return recovered, self.workspace.times[-1].reused

    def _measured(self, name: str, plans: Sequence[Plan]) -> list[ProfilePoint]:
        """What the device measured of each plan, interleaved; plans of equal widths are one file."""
        points = measure_cuts(
            self.backbone,
            {number: plan.counts for number, plan in enumerate(plans)},
            self.workspace.folder / "cuts",
            name=f"{self.backbone.name}-{name}",
            runtime=self.profile.runtime_name,
            seconds=self.sizes.seconds,
        )
        return [points[number] for number in range(len(plans))]


def _trial(
    test: Samples, rows: Sequence[dict[str, Any]], right: Mapping[tuple[str, float], NDArray[np.bool_]]
) -> Trial:
    methods = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != DENSE):
        mine = [row for row in rows if row["method"] == method]
        latency = np.array([row["quiet_ms"] for row in mine])
        methods[method] = Cuts(latency, np.stack([right[method, row["latency_share_asked"]] for row in mine]))
    return Trial(test.clusters, methods)


def _figures(trials: Mapping[str, Trial], seed: int) -> dict[str, Figure]:
    """Over all tasks and for each: how much longer the others take at equal accuracy, and points at equal latency.

    At each latency the better of the uniform cuts counts, and the better of torch-pruning's importances.
    """
    methods = next(iter(trials.values())).methods
    rivals = {"uniform_cut": [name for name in methods if name.startswith(UNIFORM)], "tp": [*IMPORTANCES]}
    statistics: dict[str, Statistic] = {}
    for name, rival in rivals.items():
        statistics[f"speed_vs_{name}"] = partial(_compare, speed, rival)
        statistics[f"advantage_vs_{name}"] = partial(_compare, _points, rival)
    figures = {}
    for suffix, chosen in {"": list(trials.values()), **{f".{name}": [one] for name, one in trials.items()}}.items():
        for name, found in estimate(chosen, statistics, seed).items():
            figures[f"{name}{suffix}"] = Figure(
                found.value, "ratio" if name.startswith("speed") else "points", found.ci95
            )
    return figures


def _points(ours: Curve, other: Curve) -> float:
    return 100 * advantage(ours, other)


def _compare(of: Callable[[Curve, Curve], float], rival: Sequence[str], curves: Mapping[str, Curve]) -> float:
    return of(curves[OURS], reduce(better, [curves[name] for name in rival]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
