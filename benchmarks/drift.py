"""Does the drift watch cry wolf, what does it see, how soon, and what does it cost?

False alarms on long streams of a line that does not change: independent frames, and video in which parts stay and the
light wanders. Then kinds of changes after a while of calm: frames until the alarm, and the share that is missed. The
line and its frames are simulated (:mod:`benchmarks.drift_world`); statistics, model and watch are the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from kiridashi.drift.events import make_events, occurrences, share_limit
from kiridashi.drift.evidence import no_evidence, taken
from kiridashi.drift.rows import Row
from kiridashi.drift.watch import ALPHA, REFERENCE_FRAMES, WatchState, advanced, arrays, new_watch

from benchmarks.drift_cost import CostOptions, measure_costs
from benchmarks.drift_world import (
    CHANGES,
    OTHERS,
    World,
    changed_stream,
    iid_stream,
    make_world,
    video_draws,
    video_stream,
)
from benchmarks.report import Figure, Report, parse_options, rounded, table

PIECE = 8
SERVER_ROWS = 128
MISSED_AFTER = 2000


@dataclass(frozen=True)
class Size:
    """How much is run: tasks, null streams and their frames, changes per task and kind."""

    tasks: int
    frames: int
    parts: int
    nulls: int
    null_frames: int
    video_nulls: int
    video_frames: int
    changes: int


FULL = Size(
    tasks=2, frames=500, parts=60, nulls=30, null_frames=8_000, video_nulls=10, video_frames=200_000, changes=10
)
QUICK = Size(tasks=1, frames=400, parts=40, nulls=20, null_frames=3_000, video_nulls=4, video_frames=120_000, changes=6)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables and figures, write the report; 1 if false alarms are above the promised bound."""
    options = parse_options("drift", "false alarms, delays and cost of the drift watch", arguments)
    torch.set_num_threads(1)
    report, size = Report("drift", options), QUICK if options.quick else FULL
    worlds = [make_world(n, size.frames, size.parts, options.seed) for n in range(size.tasks)]
    rng = np.random.default_rng(options.seed)
    for world in worlds:
        report.rows.append({"part": "world", "task": world.task, "accuracy": round(world.accuracy, 3)})
    _nulls(report, worlds, size, rng)
    _changes(report, worlds, size, rng)
    _server(report, worlds, size, rng)
    cost = measure_costs(CostOptions(seed=options.seed, repeats=300 if options.quick else 2000))
    report.rows.append(rounded({"part": "cost", **vars(cost)}))
    report.figures["us_per_frame"] = Figure(cost.us_per_frame, "us")
    for name in ("offer_us", "sample_us_64", "sample_us_224", "sample_us_1080p"):
        report.figures[f"cost.{name}"] = Figure(getattr(cost, name), "us")
    report.figures["cost.look_cpu_s"] = Figure(cost.look_cpu_s, "s")
    report.figures["cost.look_peak_mib"] = Figure(cost.look_peak_mib, "MiB")
    report.print_figures()
    report.write()
    shares = [report.figures[f"false_alarm_share.{kind}"] for kind in ("iid", "video")]
    return int(any(figure.ci95 is not None and figure.ci95[0] > ALPHA for figure in shares))


def _nulls(report: Report, worlds: Sequence[World], size: Size, rng: np.random.Generator) -> None:
    """False alarms of whole watches, and of the same tests on video that is not thinned."""
    calm = [
        _advanced_by(world, iid_stream(world, size.null_frames, rng), iid_stream(world, SERVER_ROWS, rng))
        for world in worlds
        for _ in range(size.nulls)
    ]
    watches = [
        _advanced_by(world, video_stream(world, "calm", size.video_frames, rng), video_draws(world, SERVER_ROWS, rng))
        for world in worlds
        for _ in range(size.video_nulls)
    ]
    unthinned = [
        _fooled(world, video_stream(world, "calm", size.null_frames, rng)) for world in worlds for _ in range(10)
    ]
    for kind, found in (
        ("iid", [bool(watch.findings) for watch in calm]),
        ("video", [bool(watch.findings) for watch in watches]),
        ("video_unthinned", unthinned),
    ):
        report.figures[f"false_alarm_share.{kind}"] = _share(found)
        report.rows.append({"part": "null", "kind": kind, "streams": len(found), "alarmed": int(sum(found))})
    for watch in (*calm, *watches):
        report.rows += [{"part": "false alarm", "stride": watch.stride, "text": one.text} for one in watch.findings]
    strides = [watch.stride for watch in watches if watch.stride]
    learnt = [watch.held["line"].evidence.frames for watch in watches if watch.stride]
    report.figures["video.stride"] = Figure(float(np.median(strides)) if strides else None, "frames")
    report.figures["video.watched"] = Figure(float(np.median(learnt)) if learnt else None, "used frames")
    report.figures["promised_share"] = Figure(ALPHA, "share")


def _changes(report: Report, worlds: Sequence[World], size: Size, rng: np.random.Generator) -> None:
    cells = []
    for change in (*CHANGES, *OTHERS):
        delays = [
            _delay(world, change, rng, changed_stream, REFERENCE_FRAMES + int(rng.integers(200, 2000)), MISSED_AFTER)
            for world in worlds
            for _ in range(size.changes)
        ]
        cells.append(_tell(report, change, delays))
    for change in ("brightness", "blur"):
        calm, horizon = size.video_frames, size.video_frames
        delays = [_delay(world, change, rng, video_stream, calm, horizon) for world in worlds for _ in range(2)]
        cells.append(_tell(report, f"video.{change}", delays))
    print(table(["change", "seen first by", "median frames", "90th percentile", "missed"], cells))


def _tell(report: Report, change: str, delays: Sequence[tuple[float, str]]) -> list[str]:
    frames = [delay for delay, _ in delays]
    seen = [name for _, name in delays if name]
    ordered = sorted(frames)
    median, late = (ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9))
    report.figures[f"delay_median_frames.{change}"] = Figure(median if np.isfinite(median) else None, "frames")
    report.figures[f"missed_share.{change}"] = _share([not np.isfinite(delay) for delay in frames])
    first = max(sorted(set(seen)), key=seen.count) if seen else "-"
    row = {"part": "change", "change": change, "streams": len(delays), "first": first}
    report.rows.append({**row, "delays": [delay if np.isfinite(delay) else None for delay in frames]})
    missed = np.mean([not np.isfinite(delay) for delay in frames])
    return [change, first, *(f"{x:.0f}" if np.isfinite(x) else "-" for x in (median, late)), f"{missed:.0%}"]


def _server(report: Report, worlds: Sequence[World], size: Size, rng: np.random.Generator) -> None:
    """A line that is another one from its first frame on: only the server's reference can know."""
    found = []
    for world in worlds:
        for _ in range(size.changes):
            stream = changed_stream(world, "new_style", 1000, rng)
            watch = _advanced_by(world, stream, iid_stream(world, SERVER_ROWS, rng))
            found.append(any(finding.reference == "server" for finding in watch.findings))
    report.figures["server.seen_share.new_style"] = _share(found)


def _advanced_by(world: World, stream: list[Row], server: list[Row]) -> WatchState:
    return advanced(new_watch("digest", world.labels, server), stream)


def _delay(
    world: World,
    change: str,
    rng: np.random.Generator,
    make: Callable[[World, str, int, np.random.Generator], list[Row]],
    calm: int,
    horizon: int,
) -> tuple[float, str]:
    """Frames from the change to the first alarm, infinite if there is none within ``horizon``; and what saw it."""
    is_video = make is video_stream
    before = video_stream(world, "calm", calm, rng) if is_video else iid_stream(world, calm, rng)
    watch = advanced(new_watch("digest", world.labels, ()), before)
    if watch.findings or not watch.stride:
        return float("inf"), ""  # alarmed too early, or not ready: not seen
    after = make(world, change, horizon, rng)
    piece = PIECE * watch.stride
    for start in range(0, horizon, piece):
        watch = advanced(watch, after[start : start + piece])
        if watch.findings:
            return float(min(start + piece, horizon)), watch.findings[0].statistic
    return float("inf"), ""


def _fooled(world: World, stream: list[Row]) -> bool:
    """The same tests on neighbouring frames, as if they were independent."""
    values, best = arrays(stream)
    n = REFERENCE_FRAMES
    events = make_events(values[:n], best[:n], world.labels, ALPHA / 2)
    limits = np.array([event.limit for event in events.events])
    seen = occurrences(events, values[n:], best[n:])
    evidence = taken(no_evidence(len(limits)), seen, limits)
    return max(evidence.highest) >= float(np.log(len(limits) / (ALPHA / 2)))


def _share(found: Sequence[bool]) -> Figure:
    """A share with the interval of Clopper and Pearson."""
    n, k = len(found), int(sum(found))
    return Figure(k / n, "share", (1 - share_limit(n - k + 1, n, 0.025), share_limit(k + 1, n, 0.025)))


if __name__ == "__main__":
    sys.exit(main())
