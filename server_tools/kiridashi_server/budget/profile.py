"""What a device class was measured to need, and what a cut is expected to need there.

The model is deliberately small: a handful of cuts of the backbone itself are measured on the device, and three
non-negative linear models are fitted to them.

* file    = f0 + f1 * parameters
* memory  = m0 + m1 * parameters
* latency = t0 + t1 * parameters + t2 * MACs, for the median; a budget's 95th percentile is the median times the
  ratio of the two as measured, because the tail is the machine's and not the model's

Residuals are weighted by the measured value, so that a small model counts as much as the dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from kiridashi.budget import Measurement
from kiridashi.errors import InputError
from scipy.optimize import nnls

_LEAST_POINTS = 3


class ProfilePoint(msgspec.Struct, frozen=True):
    """One measured cut: its parameter count, its multiply-accumulates per image, and what the device saw."""

    parameters: int
    macs: int
    measured: Measurement


class Forecast(msgspec.Struct, frozen=True):
    """What a cut of a given size is expected to need on the device."""

    memory_bytes: float
    file_bytes: float
    latency_p95_ms: float


class Profile(msgspec.Struct, frozen=True):
    """Measurements of one device class for one runtime, with the models fitted to them.

    Attributes:
        memory: (m0 in bytes, m1 in bytes per parameter).
        file: (f0 in bytes, f1 in bytes per parameter).
        latency: (t0 in ms, t1 in ms per parameter, t2 in ms per MAC), of the median.
        tail: 95th percentile over median, the median of the points' ratios.
        error: largest relative residual of the fit for memory, file and median latency.
        channel_multiple: widths are kept at multiples of this.
    """

    runtime: str
    threads: int
    hardware: Literal["real", "emulated"]
    machine: str
    points: tuple[ProfilePoint, ...]
    memory: tuple[float, float]
    file: tuple[float, float]
    latency: tuple[float, float, float]
    tail: float
    error: tuple[float, float, float]
    channel_multiple: int = 8

    def forecast(self, parameters: int, macs: int) -> Forecast:
        """Expected peak memory, file size and p95 latency of a cut with these counts."""
        return Forecast(
            memory_bytes=self.memory[0] + self.memory[1] * parameters,
            file_bytes=self.file[0] + self.file[1] * parameters,
            latency_p95_ms=self.tail * (self.latency[0] + self.latency[1] * parameters + self.latency[2] * macs),
        )

    def corrected(self, point: ProfilePoint) -> Profile:
        """This profile scaled so that its forecast at ``point`` is what was measured there."""
        expected = self.forecast(point.parameters, point.macs)
        memory = point.measured.memory_bytes / expected.memory_bytes
        file = point.measured.file_bytes / expected.file_bytes
        latency = point.measured.latency_p95_ms / expected.latency_p95_ms
        return msgspec.structs.replace(
            self,
            points=(*self.points, point),
            memory=tuple(memory * value for value in self.memory),
            file=tuple(file * value for value in self.file),
            latency=tuple(latency * value for value in self.latency),
        )


def fit_profile(points: Sequence[ProfilePoint], machine: str, channel_multiple: int = 8) -> Profile:
    """Fit the three models to measured cuts of one backbone on one device.

    Args:
        points: at least three cuts of different sizes, all measured with one runtime and thread count.
        machine: a description of the device for people.
        channel_multiple: widths that the device runs well.

    Raises:
        InputError: fewer than three sizes, or measurements of different runtimes or thread counts.
    """
    kinds = {(p.measured.runtime, p.measured.threads, p.measured.hardware) for p in points}
    if len({p.parameters for p in points}) < _LEAST_POINTS or len(kinds) != 1:
        raise InputError(
            f"a profile cannot be fitted to these {len(points)} measurements",
            why=f"it takes {_LEAST_POINTS} sizes, all measured with one runtime and one thread count",
            next_step="measure more cuts with: kiridashi-agent measure",
        )
    runtime, threads, hardware = kinds.pop()
    one = np.ones(len(points))
    parameters = np.array([p.parameters for p in points], dtype=np.float64)
    macs = np.array([p.macs for p in points], dtype=np.float64)
    memory, memory_error = _fit(one, parameters, target=[p.measured.memory_bytes for p in points])
    file, file_error = _fit(one, parameters, target=[p.measured.file_bytes for p in points])
    latency, latency_error = _fit(one, parameters, macs, target=[p.measured.latency_p50_ms for p in points])
    return Profile(
        runtime=runtime,
        threads=threads,
        hardware=hardware,
        machine=machine,
        points=tuple(points),
        memory=(memory[0], memory[1]),
        file=(file[0], file[1]),
        latency=(latency[0], latency[1], latency[2]),
        tail=float(np.median([p.measured.latency_p95_ms / p.measured.latency_p50_ms for p in points])),
        error=(memory_error, file_error, latency_error),
        channel_multiple=channel_multiple,
    )


def _fit(*columns: np.ndarray, target: Sequence[float]) -> tuple[list[float], float]:
    """Non-negative least squares on relative residuals; columns are scaled to one for conditioning."""
    measured = np.asarray(target, dtype=np.float64)
    scales = [float(np.abs(column).max()) for column in columns]
    design = np.stack([column / scale for column, scale in zip(columns, scales, strict=True)], axis=1)
    weights, _ = nnls(design / measured[:, None], np.ones(len(measured)))
    error = float(np.abs(design @ weights / measured - 1).max())
    return [float(weight / scale) for weight, scale in zip(weights, scales, strict=True)], error
