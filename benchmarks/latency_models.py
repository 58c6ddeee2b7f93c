"""How well is the latency of a cut predicted? Random cuts that no model has seen, and other predictors beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from kiridashi.artifacts import describe_file, write_atomic
from kiridashi.manifest import RuntimeName
from kiridashi.probes import PROBE_SET_NAME, ProbeGraph, ProbeReport, ProbeSet
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.device import measure_probe_set
from kiridashi_server.budget.probes import (
    KINDS,
    ProbeSettings,
    export_bare,
    file_name,
    first_units,
    make_probe_set,
    random_widths,
)
from kiridashi_server.budget.profile import Profile, ProfilePoint, fit_profile, points_of, price
from kiridashi_server.budget.requirements import Requirements

from benchmarks.layer_sums import layer_sum_ms

FloatArray = npt.NDArray[np.float64]
_SPREADS = (0.3, 0.7)
_SITTINGS = 3
"""Of the time that is given: on a busy machine one may not be enough, and the next goes on where it stopped."""


@dataclass(frozen=True)
class Case:
    """One input size and runtime, with its folder for exported cuts."""

    pixels: int
    runtime: RuntimeName
    folder: Path

    @property
    def name(self) -> str:
        """As figures have it."""
        return f"{self.pixels}.{self.runtime}"


@dataclass(frozen=True)
class Predicted:
    """What came of one case.

    Attributes:
        profile: fitted to the first report, as the product does.
        rows: one for each held-out cut.
        repeatability: relative differences of the cuts that were measured in both reports, the reports' common factor
            taken out, float64 [n].
        drift: that common factor, relative.
    """

    profile: Profile
    rows: list[dict[str, Any]]
    repeatability: FloatArray
    drift: float


def predict_cuts(backbone: Backbone, case: Case, *, fitted: int, held_out: int, seconds: float, seed: int) -> Predicted:
    """Profile this machine, then measure the profile's cuts again together with cuts that no model has seen.

    The models under test are fitted to the profile's cuts as they were in the second run, so that what is compared was
    measured interleaved; both runs together give the repeatability.

    Args:
        backbone: of the case's input size.
        case: where and for which runtime.
        fitted: cuts that models are fitted to, the dense one included.
        held_out: cuts that they are tested with, at the channel multiple that the profile found.
        seconds: of measuring, for each run.
        seed: of the widths; held-out ones have another.
    """
    settings = ProbeSettings(runtime=case.runtime, cuts=fitted, seed=seed)
    probes = make_probe_set(backbone, case.folder / "profile", settings)
    first = _measure(case.folder / "profile", seconds)
    profile = fit_profile(probes, first, backbone.quantities)
    both = _with_held_out(backbone, case, probes, held_out, profile.multiple, seed + 1)
    second = _measure(case.folder / "both", seconds * (1 + held_out / len(probes.graphs)))
    seen = [point for point in points_of(both, second)[: len(probes.graphs)] if not point.multiple]
    again = _fit_again(both, second, len(probes.graphs), backbone)
    rows = _rows(backbone, case, again, seen, points_of(both, second)[len(probes.graphs) :], both)
    ratios = _log_ratios(probes, first, second)
    return Predicted(profile, rows, np.abs(ratios - np.median(ratios)), float(np.expm1(np.median(ratios))))


def _measure(folder: Path, seconds: float) -> ProbeReport:
    (folder / "record").unlink(missing_ok=True)  # a benchmark measures anew
    for _ in range(_SITTINGS):
        report = measure_probe_set(folder, seconds=seconds)
        if report.complete:
            break
    return report


def _with_held_out(backbone: Backbone, case: Case, probes: ProbeSet, count: int, multiple: int, seed: int) -> ProbeSet:
    """The profile's graphs and new ones, in one folder."""
    folder = case.folder / "both"
    folder.mkdir(parents=True, exist_ok=True)
    for graph in probes.graphs:
        write_atomic(folder / graph.artifact.name, (case.folder / "profile" / graph.artifact.name).read_bytes())
    rng = np.random.default_rng(seed)
    graphs = []
    for number, share in enumerate(rng.permutation(np.linspace(0.12, 0.95, count))):
        widths = random_widths(backbone.layout, float(share), _SPREADS[number % 2], multiple, rng)
        path = folder / file_name(backbone, f"held-out-{number:02d}", widths, case.runtime)
        if not path.is_file():
            export_bare(backbone, first_units(backbone.layout, widths), path, case.runtime)
        graphs.append(ProbeGraph(describe_file(path, KINDS[case.runtime]), "cut", widths))
    both = ProbeSet(
        name=f"{probes.name}-held-out",
        backbone=probes.backbone,
        backbone_fingerprint=probes.backbone_fingerprint,
        layout_digest=probes.layout_digest,
        height=probes.height,
        width=probes.width,
        runtime=probes.runtime,
        graphs=(*probes.graphs, *graphs),
    )
    write_atomic(folder / PROBE_SET_NAME, both.encode())
    return both


def _fit_again(both: ProbeSet, report: ProbeReport, seen: int, backbone: Backbone) -> Profile:
    """The models fitted to the first ``seen`` graphs of a report."""
    part = ProbeSet(**{**_fields(both), "graphs": both.graphs[:seen]})
    names = {graph.artifact.name for graph in part.graphs}
    timings = tuple(timing for timing in report.timings if timing.name in names)
    fields = {name: getattr(report, name) for name in report.__struct_fields__}
    return fit_profile(part, ProbeReport(**{**fields, "probes": part.digest, "timings": timings}), backbone.quantities)


def _fields(probes: ProbeSet) -> dict[str, Any]:
    return {name: getattr(probes, name) for name in probes.__struct_fields__}


def _rows(
    backbone: Backbone,
    case: Case,
    profile: Profile,
    seen: Sequence[ProfilePoint],
    unseen: Sequence[ProfilePoint],
    both: ProbeSet,
) -> list[dict[str, Any]]:
    """Each held-out cut as measured and as predicted."""
    costs, needs = backbone.quantities.costs, Requirements.of(profile, backbone.quantities)
    work = backbone.quantities.workload(profile.block)
    macs = _line([costs.macs(point.widths) for point in seen], [point.quiet_ms for point in seen])
    dense = seen[0]
    files = {str(sorted(graph.widths.items())): graph.artifact.name for graph in both.graphs}

    def summed(point: ProfilePoint) -> float | None:
        name = files[str(sorted(point.widths.items()))]
        return layer_sum_ms(case.folder / "both" / name) if case.runtime == "onnxruntime" else None

    dense_sum = summed(dense)
    rows = []
    for point in unseen:
        forecast, of_layers = needs.forecast(point.widths), summed(point)
        predicted = {
            "ours": price(profile.latency, work.at(point.widths)),
            "macs": macs[0] + macs[1] * costs.macs(point.widths),
            "layer_sum": of_layers,
            "layer_sum_scaled": of_layers / dense_sum * dense.quiet_ms if of_layers and dense_sum else None,
        }
        rows.append(
            {
                "case": case.name,
                "parameters": costs.parameters(point.widths),
                "macs": costs.macs(point.widths),
                "quiet_ms": point.quiet_ms,
                **{f"{name}_ms": value for name, value in predicted.items()},
                **{
                    f"{name}_error": None if value is None else value / point.quiet_ms - 1
                    for name, value in predicted.items()
                },
                "memory_error": forecast.memory_bytes / point.memory_bytes - 1,
                "file_error": forecast.file_bytes / point.file_bytes - 1,
            }
        )
    return rows


def _line(amounts: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """A line through measurements, relative least squares: intercept and slope."""
    target = np.asarray(times)
    design = np.stack([np.ones(len(target)), np.asarray(amounts, dtype=np.float64)], axis=1) / target[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(design, np.ones(len(target)), rcond=None)
    return float(intercept), float(slope)


def _log_ratios(probes: ProbeSet, first: ProbeReport, second: ProbeReport) -> FloatArray:
    before = {timing.name: timing.quiet_ms for timing in first.timings}
    after = {timing.name: timing.quiet_ms for timing in second.timings}
    names = [graph.artifact.name for graph in probes.graphs]
    return np.log([after[name] / before[name] for name in names])
