"""How fast is a large bank, and what do summaries and stacked scores save?

``python -m benchmarks.bank --json OUT [--quick] [--seed N]``. Ten thousand records (``--quick``: 500) with made-up
contents in the layout of EfficientNet-Lite0: scores, first-order scores, a head for 12 classes and moments of 1,280
features. A tenth of the records is of another backbone, a twentieth was read off checkpoints and has no head.
Everything is read from a real folder, through the page cache. "Before" is what the same question costs by reading
every array.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Provenance, Record, encode_arrays
from kiridashi_server.bank.store import Bank
from kiridashi_server.compose.composition import robust_mean
from kiridashi_server.graph.layout import Layout

from benchmarks.report import Figure, Report, parse_options, rounded, show, table

CLASSES, FEATURES = 12, 1280
GOALS_S = {"summaries of all": 1.0, "uniform composition, stack from its file": 2.0, "one record": 0.02}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write the report; 1 if a goal was missed."""
    options = parse_options("bank", "time of look-ups and of composition in a large bank", arguments)
    report = Report("bank", options)
    layout = Backbone.load().layout
    count = 500 if options.quick else 10_000
    with tempfile.TemporaryDirectory() as folder, Bank.open(Path(folder) / "bank") as bank:
        made = _records(layout, count, np.random.default_rng(options.seed))
        _time(
            report,
            "make and add one record",
            lambda: bank.add_all((one, encode_arrays(one)) for one in made),
            parts=count,
        )
        _lookups(report, bank, np.random.default_rng(options.seed))
        _compositions(report, bank, layout)
        one = bank.summaries()[0].id
        _time(report, "verify", bank.verify)
        _time(report, "forget a record", lambda: bank.remove(one))
    report.rows = [rounded(row) for row in report.rows]
    report.figures.update(_figures(report.rows, count))
    cells = [[row["what"], show(row["seconds"], ".3g"), show(row["times"])] for row in report.rows]
    print(table(("what", "seconds", "times"), cells))
    report.print_figures()
    report.write()
    return int(any(_seconds(report.rows, what) > goal for what, goal in GOALS_S.items()))


def _lookups(report: Report, bank: Bank, generator: np.random.Generator) -> None:
    everything = bank.summaries()
    keys = iter(generator.permutation([one.id for one in everything])[:90].tolist())
    tasks = iter(generator.permutation([one.task for one in everything])[:30].tolist())
    _time(report, "opening the bank", lambda: Bank.open(bank.folder).close(), times=5)
    _time(report, "summaries of all", bank.summaries, times=5)
    _time(report, "summaries of a task", lambda: bank.summaries(task=next(tasks)), times=30)
    _time(report, "summary of one record", lambda: bank.summary(next(keys)), times=30)
    _time(report, "one record", lambda: bank.get(next(keys)[:16]), times=30)
    _time(report, "heads of one backbone", lambda: bank.list(backbone_fingerprint="this"))
    _time(report, "before: every array of all", lambda: [dict(one.scores) | dict(one.taylor) for one in bank.list()])


def _compositions(report: Report, bank: Bank, layout: Layout) -> None:
    def stacked(weights: Callable[[int], Any]) -> dict[str, Any]:
        stack = bank.stack("this", layout.digest)
        if stack is None:
            raise ValueError("the bank is too small for a stack")
        values = weights(len(stack.ids))
        return stack.mean(dict(zip(stack.ids, values / values.sum(), strict=True)))

    _time(report, "uniform composition, stack made anew", lambda: stacked(np.ones))
    _time(report, "uniform composition, stack from its file", lambda: stacked(np.ones), times=5)
    _time(report, "weighted composition, stack from its file", lambda: stacked(lambda n: np.arange(n) + 1.0), times=5)
    learnt = [one for one in bank.list(backbone_fingerprint="this") if one.kind == "learnt"]
    weights = np.full(len(learnt), 1 / len(learnt))
    _time(report, "before: uniform composition", lambda: robust_mean([dict(one.scores) for one in learnt], weights))


def _records(layout: Layout, count: int, generator: np.random.Generator) -> Iterator[Record]:
    level = {name: generator.lognormal(0, 1, size) for name, size in layout.sizes.items()}

    def scores() -> dict[str, Any]:
        return {
            name: (base * generator.lognormal(0, 0.3, len(base))).astype(np.float32) for name, base in level.items()
        }

    for number in range(count):
        has_head = number % 20 != 0
        descriptor = {
            "head_weight": generator.normal(size=(CLASSES, FEATURES)).astype(np.float32),
            "head_bias": np.zeros(CLASSES, dtype=np.float32),
            "feature_mean": generator.random(FEATURES).astype(np.float32),
            "feature_variance": generator.random(FEATURES).astype(np.float32),
        }
        yield Record(
            task=f"line {number:05d}",
            labels=tuple(f"class {index}" for index in range(CLASSES)),
            backbone_fingerprint="other" if number % 10 == 1 else "this",
            layout_digest=layout.digest,
            samples=96 if has_head else 0,
            scores=scores(),
            taylor=scores() if has_head else {},
            outcomes={"dense": 0.9, "masked_50%": 0.8, "masked_30%": 0.7},
            provenance=Provenance(0, {"iterations": 40, "batch_size": 32}, "1", f"task {number}", 20.0),
            created="2026-01-01T00:00:00+00:00",
            kind="learnt" if has_head else "tuned",
            **(descriptor if has_head else {}),
        )


def _time(report: Report, what: str, work: Callable[[], object], *, times: int = 1, parts: int = 1) -> None:
    """A row with the median wall time of a part."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append((time.perf_counter() - start) / parts)
    report.rows.append({"what": what, "seconds": statistics.median(seconds), "max": max(seconds), "times": times})


def _seconds(rows: list[dict[str, Any]], what: str) -> float:
    return float(next(row["seconds"] for row in rows if row["what"] == what))


def _figures(rows: list[dict[str, Any]], count: int) -> dict[str, Figure]:
    names = {what: what.replace(",", "").replace(":", "").replace(" ", "_") for what in (row["what"] for row in rows)}
    figures = {"records": Figure(count, "records")}
    return figures | {f"seconds.{names[row['what']]}": Figure(row["seconds"], "s") for row in rows}


if __name__ == "__main__":
    sys.exit(main())
