"""What a device class was measured to need, and the models fitted to it.

A device measures whole cuts of the backbone (:mod:`kiridashi.probes`). Three non-negative linear models are fitted:

* file    = f0 + f1 * parameters
* memory  = m0 + m1 * parameters + m2 * activations alive at once
* latency = t0 + the sum over kinds of work of a price times how much there is of it
  (:class:`~kiridashi_server.graph.workload.Workload`), undisturbed; a budget's 95th percentile is that times the ratio
  of the two as measured, because the tail is the machine's and not the model's

Residuals are relative to the measured value, so that a small model counts as much as the dense one. Errors are
those of points that were left out of the fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, log
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from kiridashi.budget import Limit, Measurement
from kiridashi.errors import InputError
from kiridashi.manifest import RuntimeName
from kiridashi.probes import ProbeReport, ProbeSet, Timing
from scipy.optimize import nnls

from kiridashi_server.graph.quantities import Quantities
from kiridashi_server.graph.workload import RAGGED, Workload

FloatArray = npt.NDArray[np.float64]

BLOCKS = (8, 16, 32)
FIXED = "fixed"
_LEAST_POINTS = 3
_PERCENTILE = 90
_CLIFF = 1.05
_RAGGED_WEIGHT = 0.3
"""Of cuts unlike those that the solver makes: they tell what raggedness costs, and bend the other prices."""


class ProfilePoint(msgspec.Struct, frozen=True):
    """One measured cut.

    Attributes:
        widths: units kept by group.
        quiet_ms: of one prediction without disturbance.
        latency_p50_ms, latency_p95_ms: wall time, percentiles, alone in a process.
        memory_bytes, file_bytes: peak resident set of that process, and size of the model file.
        noise: how far the halves of the measurement are apart, relative, after what all graphs have in common.
        multiple: of a probe for the channel multiple, what its widths are odd multiples of; else 0.
    """

    widths: dict[str, int]
    quiet_ms: float
    latency_p50_ms: float
    latency_p95_ms: float
    memory_bytes: int
    file_bytes: int
    noise: float = 0.0
    multiple: int = 0


class Forecast(msgspec.Struct, frozen=True):
    """What a cut is expected to need on the device."""

    memory_bytes: float
    file_bytes: float
    latency_p95_ms: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one device class for one backbone and runtime, with the models fitted to them.

    Attributes:
        device_class, hardware: what was measured.
        runtime_name, runtime, threads: what ran the cuts, its library and version, threads inside one prediction.
        backbone_fingerprint, layout_digest, macs: what was cut, and its multiply-accumulates, which tell input sizes
            apart.
        points: the measured cuts.
        block: of channels, that the kernels are taken to work on.
        multiple: channel multiple, at which widths are kept: the block, or less where a cut at less was as fast.
        block_errors: median relative error, left out, of the latency model for each block that was tried.
        cliffs: by number, the time of a cut whose widths are odd multiples of it, over what so much work takes in
            whole blocks.
        memory, file, latency: prices by what is paid for, in bytes and (undisturbed) milliseconds.
        tail: 95th percentile of wall time over undisturbed time, the median of the points' ratios.
        noise: the median over points of :attr:`ProfilePoint.noise`.
        error: for every limit, the 90th percentile of the relative error of points left out of the fit; for latency
            that of the 95th percentile, so that what the points' tails differ by is part of it.
    """

    device_class: str
    hardware: Literal["real", "emulated"]
    runtime_name: RuntimeName
    runtime: str
    threads: int
    backbone_fingerprint: str
    layout_digest: str
    macs: int
    points: tuple[ProfilePoint, ...]
    block: int
    multiple: int
    block_errors: dict[int, float]
    cliffs: dict[int, float]
    memory: dict[str, float]
    file: dict[str, float]
    latency: dict[str, float]
    tail: float
    noise: float
    error: dict[Limit, float]

    def corrected(self, measured: Measurement, expected: Forecast) -> Profile:
        """This profile scaled so that what it expected of a cut is what was measured."""
        ratios = (
            measured.memory_bytes / expected.memory_bytes,
            measured.file_bytes / expected.file_bytes,
            measured.latency_p95_ms / expected.latency_p95_ms,
        )
        memory, file, latency = (
            {name: ratio * price for name, price in prices.items()}
            for ratio, prices in zip(ratios, (self.memory, self.file, self.latency), strict=True)
        )
        return msgspec.structs.replace(self, memory=memory, file=file, latency=latency)

    @property
    def dense(self) -> ProfilePoint:
        """The measurement of the dense model."""
        return self.points[0]


def points_of(probes: ProbeSet, report: ProbeReport) -> tuple[ProfilePoint, ...]:
    """What was measured of each graph, the dense model first.

    Raises:
        InputError: the report is of another probe set, is not complete, or has values that are no measurement.
    """
    if report.probes != probes.digest:
        raise InputError(
            "the report is not of this probe set",
            why=f"it names {report.probes[:12]}, the set is {probes.digest[:12]}",
            next_step="give the folder of the probe set that the device measured",
        )
    timings = {timing.name: timing for timing in report.timings}
    missing = [graph.artifact.name for graph in probes.graphs if graph.artifact.name not in timings]
    if missing or not report.complete:
        raise InputError(
            "the report is not complete",
            why=f"{len(missing)} of {len(probes.graphs)} graphs were not measured" if missing else "it says so",
            next_step="run kiridashi-agent measure --profile again: it goes on where it stopped",
        )
    _check(timings.values())
    common = float(np.median([log(timing.halves_ms[0] / timing.halves_ms[1]) for timing in timings.values()]))
    points = []
    for graph in probes.graphs:
        timing = timings[graph.artifact.name]
        points.append(
            ProfilePoint(
                widths=graph.widths,
                quiet_ms=timing.quiet_ms,
                latency_p50_ms=timing.p50_ms,
                latency_p95_ms=timing.p95_ms,
                memory_bytes=timing.memory_bytes,
                file_bytes=graph.artifact.bytes,
                noise=abs(log(timing.halves_ms[0] / timing.halves_ms[1]) - common),
                multiple=graph.multiple,
            )
        )
    return tuple(points)


def _check(timings: Iterable[Timing]) -> None:
    for timing in timings:
        numbers = (timing.quiet_ms, *timing.halves_ms, timing.p50_ms, timing.p95_ms, float(timing.memory_bytes))
        if not all(0 < number < inf for number in numbers):
            raise InputError(f"the report's values of {timing.name} are no measurement", why=f"{numbers}")


def fit_profile(probes: ProbeSet, report: ProbeReport, quantities: Quantities) -> Profile:
    """Fit the models to what a device measured.

    Args:
        probes: what was measured; its first graph is the dense model.
        report: the device's answer.
        quantities: of the backbone that the probes are cuts of.

    Raises:
        InputError: as :func:`points_of`, the probes are of another backbone, or there are fewer than three cuts of
            different sizes.
    """
    points = points_of(probes, report)
    if probes.layout_digest != quantities.layout.digest:
        raise InputError(
            f"the probe set '{probes.name}' is of another backbone than the one it is fitted for",
            next_step="name the backbone and the image size that the probe set was made with",
        )
    cuts = [point for point in points if not point.multiple]
    if len({point.file_bytes for point in cuts}) < _LEAST_POINTS:
        raise InputError(
            f"a profile cannot be fitted to {len(cuts)} cuts",
            why=f"it takes {_LEAST_POINTS} of different sizes",
            next_step="make a larger probe set: kiridashi profile make --cuts 32",
        )
    ones = {FIXED: np.ones(len(cuts))}
    parameters = np.array([quantities.costs.parameters(point.widths) for point in cuts], dtype=np.float64)
    activations = np.array([quantities.alive(point.widths) for point in cuts], dtype=np.float64)
    quiet = np.array([point.quiet_ms for point in cuts])
    file = _Fit.of({**ones, "parameters": parameters}, np.array([float(point.file_bytes) for point in cuts]))
    memory = _Fit.of(
        {**ones, "parameters": parameters, "activations": activations},
        np.array([float(point.memory_bytes) for point in cuts]),
    )
    fits = {block: _fit_latency(quantities.workload(block), cuts, quiet) for block in BLOCKS}
    block = min(fits, key=lambda size: float(np.mean(fits[size].errors ** 2)))
    full = np.array([_fills_blocks(point.widths, quantities.layout.sizes, block) for point in cuts])
    latency = _fit_latency(quantities.workload(block), cuts, quiet, np.where(full, 1.0, _RAGGED_WEIGHT))
    whole = {kind: value for kind, value in latency.prices.items() if kind not in RAGGED}
    cliffs = {
        point.multiple: point.quiet_ms / price(whole, quantities.workload(block).at(point.widths))
        for point in points
        if point.multiple
    }
    tails = np.array([point.latency_p95_ms / point.quiet_ms for point in cuts])
    tail = float(np.median(tails))
    return Profile(
        device_class=report.device_class,
        hardware=report.hardware,
        runtime_name=probes.runtime,
        runtime=report.runtime,
        threads=report.threads,
        backbone_fingerprint=probes.backbone_fingerprint,
        layout_digest=probes.layout_digest,
        macs=quantities.costs.macs({}),
        points=points,
        block=block,
        multiple=_multiple(block, cliffs),
        block_errors={size: float(np.median(np.abs(fit.errors))) for size, fit in fits.items()},
        cliffs=cliffs,
        memory=memory.prices,
        file=file.prices,
        latency=latency.prices,
        tail=tail,
        noise=float(np.median([point.noise for point in cuts])),
        error={"memory": memory.error, "file": file.error, "latency": latency.error_with(tail / tails)},
    )


def price(prices: Mapping[str, float], amounts: Mapping[str, float]) -> float:
    """What the amounts cost; what has no price costs nothing, and the fixed price is always paid."""
    return prices.get(FIXED, 0.0) + sum(prices.get(name, 0.0) * amount for name, amount in amounts.items())


def _fills_blocks(widths: Mapping[str, int], sizes: Mapping[str, int], block: int) -> bool:
    """Whether every group is whole or fills its blocks, as in the cuts that the solver makes."""
    return all(width % block == 0 or width == sizes[name] for name, width in widths.items())


def _fit_latency(
    workload: Workload, points: Sequence[ProfilePoint], quiet: FloatArray, weights: FloatArray | None = None
) -> _Fit:
    amounts = [workload.at(point.widths) for point in points]
    columns = {kind: np.array([amount[kind] for amount in amounts]) for kind in workload.kinds}
    return _Fit.of({FIXED: np.ones(len(points)), **columns}, quiet, weights)


def _multiple(block: int, cliffs: Mapping[int, float]) -> int:
    """The block, or a smaller multiple if cuts at odd multiples of it and of all between were as fast."""
    multiple = block
    for smaller in sorted((size for size in cliffs if size < block), reverse=True):
        if cliffs[smaller] > _CLIFF:
            break
        multiple = smaller
    return multiple


class _Fit(msgspec.Struct, frozen=True):
    """Prices by column, and the relative errors of points left out one at a time, float64 [n]."""

    prices: dict[str, float]
    errors: FloatArray
    weights: FloatArray

    @classmethod
    def of(cls, columns: Mapping[str, FloatArray], target: FloatArray, weights: FloatArray | None = None) -> _Fit:
        """Non-negative least squares on weighted relative residuals; columns are scaled to one for conditioning."""
        weight = np.ones(len(target)) if weights is None else weights
        used = {name: column for name, column in columns.items() if column.any()}
        scales = np.array([column.max() for column in used.values()])
        design = np.stack(list(used.values()), axis=1) / scales
        found = _solve(design, target, weight)
        errors = np.empty(len(target))
        for left_out in range(len(target)):
            rest = np.arange(len(target)) != left_out
            errors[left_out] = (
                design[left_out] @ _solve(design[rest], target[rest], weight[rest]) / target[left_out] - 1
            )
        prices = {name: float(value) for name, value in zip(used, found / scales, strict=True) if value > 0}
        return cls(prices, errors, weight)

    @property
    def error(self) -> float:
        """The 90th percentile of the absolute relative errors of the points that have the full weight."""
        return self.error_with(np.ones(len(self.errors)))

    def error_with(self, factors: FloatArray) -> float:
        """The same where the forecast of each point is off by a factor of its own as well, float64 [n]."""
        errors = (1 + self.errors) * factors - 1
        return float(np.percentile(np.abs(errors[self.weights == self.weights.max()]), _PERCENTILE))


def _solve(design: FloatArray, target: FloatArray, weight: FloatArray) -> FloatArray:
    found, _ = nnls(design * (weight / target)[:, None], weight)
    return np.asarray(found, dtype=np.float64)
