"""What a tuning is asked for and what it may take, and why there may be none. No numpy here."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

from kiridashi.budget import MIB
from kiridashi.config import Config
from kiridashi.kept import KeptSamples
from kiridashi.manifest import Manifest
from kiridashi.messages import TuneReport
from kiridashi.slots import Place
from kiridashi.spool import SpoolFolder

from kiridashi_agent.jobs import TuneRequest
from kiridashi_agent.machine import available_bytes
from kiridashi_agent.process import Limits

SPARE_BYTES = 64 * MIB
"""Left to everything else on the device when no limit of memory is configured."""
LEAST_BYTES = 96 * MIB
SPARE_S = 300.0
"""For reading samples, fitting the head and judging, beside the iterations."""


def tune_request(
    config: Config, line: str, slot: Place, artifact: str, given: Collection[Path] = (), seconds: float | None = None
) -> TuneRequest:
    """The request for a configured line; ``seconds`` overrides ``tune_seconds``."""
    section = config.lines[line]
    return TuneRequest(
        state_dir=str(config.device.state_dir),
        line=line,
        slot=slot,
        artifact=artifact,
        samples=str(section.samples or ""),
        device=config.device.id,
        threads=section.threads,
        max_seconds=seconds or section.tune_seconds,
        max_recall_drop=section.max_recall_drop,
        max_accuracy_drop=section.max_accuracy_drop,
        given=tuple(str(place) for place in given),
        max_celsius=config.limits.tune_max_celsius,
        providers=section.providers,
    )


def tune_limits(config: Config, request: TuneRequest, cancel: threading.Event | None) -> Limits:
    """Time and memory of the child process that tunes."""
    memory: int | None = config.limits.tune_memory_mib * MIB
    if not memory:
        available = available_bytes()
        memory = max(available - SPARE_BYTES, LEAST_BYTES) if available else None
    return Limits(max(config.limits.job_timeout_s, request.max_seconds + SPARE_S), memory, cancel)


def obstacle(config: Config, line: str, manifest: Manifest, runtimes: Collection[str], *, given: bool = False) -> str:
    """Why a bundle cannot be tuned on this device, empty if it can; ``given``: samples are named for this once."""
    section, state = config.lines[line], config.device.state_dir
    if not section.tune:
        return f"tune = false is set for line '{line}'"
    if manifest.train is None:
        return "the bundle has no train step"
    if "onnxruntime" not in runtimes:
        return "onnxruntime is not installed"
    has_files = section.samples is not None and section.samples.is_dir() and any(section.samples.iterdir())
    places = (SpoolFolder(state, line).answers_path, KeptSamples(state, line).path)
    if not (given or has_files or any(path.is_file() for path in places)):
        return "there are no samples: none in the line's folder, none named, none kept"
    return ""


def in_words(report: TuneReport) -> str:
    """What a tuning came to, in a sentence."""
    if not report.kept:
        return f"the model that served goes on: {report.reason}"
    sources = ", ".join(f"{source} {count}" for source, count in report.sources.items())
    bound = f"; ended after {report.iterations} iterations: {report.bound}" if report.bound else ""
    if report.best_iteration < report.iterations:
        bound += f"; the weights are those after iteration {report.best_iteration}"
    stale = f"; without the tuned weights, and not used: {', '.join(report.stale)}" if report.stale else ""
    return (
        f"tuned on {report.samples} samples and judged by {report.holdout} ({sources}): {report.reason}{bound}{stale}"
    )
