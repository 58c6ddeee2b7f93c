"""Comparisons inside what a device may spend: the profile that limits rest on, and what the cuts really took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from kiridashi.artifacts import write_atomic
from kiridashi.budget import Limit as Resource
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.device import measure_probe_set
from kiridashi_server.budget.probes import ProbeSettings, make_probe_set
from kiridashi_server.budget.profile import Profile, fit_profile

from benchmarks.measured_cuts import measure_cuts
from benchmarks.report import Figure

REFERENCE_PERCENT = 30
RESOURCES: Mapping[str, Resource] = {"latency": "latency", "memory": "memory"}
"""Limits by name: what the bank's mean cut at 30 % of the parameters is expected to need on this machine."""

_SECONDS = 90.0
_TASKS = 4
_PROFILE = "profile.json"


def device_profile(backbone: Backbone, folder: Path) -> Profile:
    """This machine's, with onnxruntime; measured once for a folder."""
    path = folder / _PROFILE
    if path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    probes = make_probe_set(backbone, folder, ProbeSettings())
    profile = fit_profile(probes, measure_probe_set(folder, seconds=_SECONDS), backbone.quantities)
    write_atomic(path, msgspec.json.encode(profile))
    return profile


def measured_ratios(backbone: Backbone, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Figure]:
    """What the cuts of the first tasks took, over what the product's took, all measured interleaved.

    Undisturbed latency for the limit ``latency``, peak memory for ``memory``: the median over tasks.
    """
    figures: dict[str, Figure] = {}
    for limit in RESOURCES:
        cuts = _cuts([row for row in rows if row["limit"] == limit])
        if cuts:
            points = measure_cuts(
                backbone, cuts, folder / limit, name="oneshot", runtime="onnxruntime", seconds=_SECONDS
            )
            found = {key: {"latency": point.quiet_ms, "memory": point.memory_bytes} for key, point in points.items()}
            figures |= _ratios(found, limit)
    return figures


def _cuts(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, int]]:
    """Widths by task and method, of the first seed, tasks and number of iterations."""
    chosen = [row for row in rows if "widths" in row and row["seed"] == rows[0]["seed"]]
    tasks = [*dict.fromkeys(row["task"] for row in chosen)][:_TASKS]
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in chosen:
        if row["task"] in tasks:
            found.setdefault((row["task"], row["method"]), row["widths"])
    return found


def _ratios(measured: Mapping[tuple[str, str], Mapping[str, float]], limit: str) -> dict[str, Figure]:
    tasks = [task for task, method in measured if method == "product"]
    figures = {}
    for method in dict.fromkeys(method for _, method in measured):
        ratios = [
            measured[task, method][limit] / measured[task, "product"][limit]
            for task in tasks
            if (task, method) in measured
        ]
        if ratios:
            figures[f"measured_{limit}_ratio.{method}"] = Figure(float(np.median(ratios)), "ratio")
    return figures
