"""``report.html``: one file, no script, no network; readable on paper and in the dark."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from kiridashi.artifacts import write_atomic
from kiridashi.budget import MIB
from markupsafe import Markup

from kiridashi_server.report import charts
from kiridashi_server.report.schema import Report


def write_page(report: Report, path: Path) -> None:
    """Render the report as a self-contained HTML page."""
    environment = Environment(
        loader=PackageLoader("kiridashi_server", "report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mib"] = lambda value: f"{value / MIB:.1f}"
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    # The charts are made here from numbers and task names; the names are escaped by the SVG writer.
    pictures = {
        "accuracy": Markup(charts.accuracy_against_size(report.results)),  # noqa: S704
        "evidence": Markup(charts.evidence_weights(report.evidence)),  # noqa: S704
        "stages": Markup(charts.stage_times(report.stages)),  # noqa: S704
    }
    page = environment.get_template("report.html.j2").render(
        report=report, pictures=pictures, gauges=_gauges(report), own=_own_result(report)
    )
    write_atomic(path, page.encode())


def _own_result(report: Report) -> object:
    """The one-shot result at the size that was delivered."""
    own = [result for result in report.results if result.method == "one-shot"]
    return min(own, key=lambda result: abs(result.kept_params - report.plan.params_after))


def _gauges(report: Report) -> list[dict[str, object]]:
    """Budget against measurement, a row a limit: text, share of the limit used, the dense model's share."""
    rows = (
        (
            "memory",
            report.budget.memory_bytes,
            report.measured.memory_bytes,
            report.dense.memory_bytes,
            MIB,
            "MiB",
        ),
        ("file", report.budget.file_bytes, report.measured.file_bytes, report.dense.file_bytes, MIB, "MiB"),
        (
            "latency p95",
            report.budget.latency_p95_ms,
            report.measured.latency_p95_ms,
            report.dense.latency_p95_ms,
            1,
            "ms",
        ),
    )
    gauges: list[dict[str, object]] = []
    for name, limit, value, dense, unit, unit_name in rows:
        top = max(value, dense, limit or 0.0)
        gauges.append(
            {
                "name": name,
                "measured": f"{value / unit:.2f} {unit_name}",
                "limit": "no limit" if limit is None else f"{limit / unit:.2f} {unit_name}",
                "dense": f"{dense / unit:.2f} {unit_name}",
                "value_pct": 100 * value / top,
                "limit_pct": None if limit is None else 100 * limit / top,
                "dense_pct": 100 * dense / top,
                "within": limit is None or value <= limit,
            }
        )
    return gauges
