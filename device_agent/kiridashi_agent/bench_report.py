"""What ``kiridashi-agent measure`` found, as data, as a table, and as rows of CSV. Pure.

Every figure is a :class:`~kiridashi.budget.Measurement`'s, which says on what hardware it was made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from kiridashi.budget import MIB, Budget, Conditions, Measurement, Range, Verdict

from kiridashi_agent.agreement import TOLERANCE, Agreement
from kiridashi_agent.history import Entry

FORMAT = "kiridashi-measure/1"


class Earlier(msgspec.Struct, frozen=True):
    """The last measurement of the same file in the same way on this device, and how far the median went since."""

    at: str
    latency_p50_ms: float
    change: float


class FileReport(msgspec.Struct, frozen=True):
    """One file: ``measured`` is the quicker of its ``rounds``, each of which was a process of its own."""

    file: str
    sha256: str
    measured: Measurement
    rounds: tuple[Measurement, ...]
    verdict: Verdict
    agreement: Agreement | None = None
    earlier: Earlier | None = None


class Compared(msgspec.Struct, frozen=True):
    """One file's time over the first one's; ``real`` if the interval leaves out 1 in every sitting."""

    file: str
    ratio: float
    low: float
    high: float
    real: bool


class Comparison(msgspec.Struct, frozen=True):
    """Files that took turns in one process, several times over. Empty ``rows`` with a note: it could not be done."""

    base: str
    sittings: int
    rounds: int
    hardware: Literal["real", "emulated"]
    rows: tuple[Compared, ...] = ()
    notes: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole call of the command. ``machine`` is :func:`kiridashi_agent.machine.description`, ``day`` is in UTC."""

    format: str = FORMAT
    agent_version: str
    day: str
    hardware: Literal["real", "emulated"]
    machine: dict[str, str | int]
    runtimes: dict[str, str]
    budget: str
    files: tuple[FileReport, ...]
    comparison: Comparison | None = None


def without_folders(report: Report) -> Report:
    """The report with the names of the files alone: a path may tell who measured."""
    replace = msgspec.structs.replace
    files = tuple(replace(entry, file=Path(entry.file).name, earlier=None) for entry in report.files)
    compared = report.comparison
    if compared is not None:
        rows = tuple(replace(row, file=Path(row.file).name) for row in compared.rows)
        compared = replace(compared, base=Path(compared.base).name, rows=rows)
    return replace(report, files=files, comparison=compared)


def table(report: Report, budget: Budget) -> str:
    """The report for people."""
    rows = [_aligned([_HEAD, *(_figures(entry) for entry in report.files)])]
    for entry in report.files:
        rows += [f"{entry.file}:", *(f"  {line}" for line in _details(entry, budget))]
    if report.comparison is not None:
        rows += _compared(report.comparison)
    machine = report.machine
    rows.append(
        f"{machine['board'] or machine['processor'] or machine['architecture']}, {machine['processors']} processors, "
        f"{machine['memory_mib']} MiB, kernel {machine['kernel']}, {report.hardware} hardware"
        + (f", virtual machine ({machine['virtual']})" if machine["virtual"] else "")
    )
    return "\n".join(rows)


def to_csv(report: Report) -> str:
    """One row for each file, with the names of the columns first; what is not reported is left empty."""
    compared = {row.file: row for row in report.comparison.rows} if report.comparison else {}
    rows = [_csv_row(entry, compared.get(entry.file)) for entry in report.files]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def history_table(entries: Sequence[Entry], *, as_csv: bool = False) -> str:
    """Earlier measurements, oldest first, for people or as rows of CSV."""
    if not entries:
        return "nothing has been measured on this device yet"
    head = ("at", "file", "sha256", "p50 ms", "p95 ms", "peak MiB", "threads", "runtime", "hardware")
    rows = [
        (
            entry.at,
            entry.file,
            entry.sha256[:12],
            f"{entry.measured.latency_p50_ms:.4g}",
            f"{entry.measured.latency_p95_ms:.4g}",
            f"{entry.measured.memory_bytes / MIB:.1f}",
            str(entry.measured.threads),
            f"{entry.measured.runtime} ({entry.measured.provider})",
            entry.measured.hardware,
        )
        for entry in entries
    ]
    if not as_csv:
        return _aligned([head, *rows])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue().rstrip("\n")


def _csv_row(entry: FileReport, compared: Compared | None) -> dict[str, object]:
    fields = msgspec.structs.asdict(entry.measured)
    conditions = msgspec.structs.asdict(fields.pop("conditions") or Conditions(seconds=0.0, processors=0))
    row: dict[str, object] = {"file": entry.file, "sha256": entry.sha256}
    for name, value in {**fields, **conditions}.items():
        if name.endswith("_ci_ms") or name in ("mhz", "celsius"):
            ends = ("low", "high") if name.endswith("_ci_ms") else ("before", "after")
            row |= {f"{name}_{end}": value[n] if value else None for n, end in enumerate(ends)}
        else:
            row[name] = "; ".join(value) if isinstance(value, list | tuple) else value
    agreement = entry.agreement
    row["repeat_p50"] = agreement.p50 if agreement else None
    row["repeat_p95"] = agreement.p95 if agreement else None
    row["repeat_reasons"] = "; ".join(agreement.reasons) if agreement else None
    row["ratio"] = compared.ratio if compared else None
    row["ratio_low"], row["ratio_high"] = (compared.low, compared.high) if compared else (None, None)
    return row


_HEAD = (
    "file",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "quiet ms",
    "first ms",
    "load ms",
    "peak MiB",
    "steady MiB",
    "file MiB",
    "mJ",
    "runtime",
    "hardware",
)


def _figures(entry: FileReport) -> tuple[str, ...]:
    one = entry.measured
    return (
        Path(entry.file).name,
        _with_interval(one.latency_p50_ms, one.p50_ci_ms),
        _with_interval(one.latency_p95_ms, one.p95_ci_ms),
        _with_interval(one.latency_p99_ms, one.p99_ci_ms),
        f"{one.quiet_ms:.3g}",
        f"{one.first_ms:.3g}",
        f"{one.load_ms:.0f}",
        f"{one.memory_bytes / MIB:.1f}",
        f"{one.steady_bytes / MIB:.1f}",
        f"{one.file_bytes / MIB:.3g}",
        "-" if one.energy_mj is None else f"{one.energy_mj:.3g}",
        f"{one.runtime} ({one.provider})",
        one.hardware,
    )


def _with_interval(value: float, interval: Range | None) -> str:
    return f"{value:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def _details(entry: FileReport, budget: Budget) -> list[str]:
    one, lines = entry.measured, []
    if budget != Budget():
        lines.append(entry.verdict.describe(budget, one))
    what = "preprocessing, model and softmax" if one.timed == "line" else "the runtime's call alone"
    lines.append(
        f"{one.runs} runs of {what}, {one.threads} thread(s), worth {one.independent_runs} independent ones; "
        f"memory limit: {one.memory_limit}"
    )
    if one.gpu_bytes is not None:
        peak = f", {one.gpu_load_peak_bytes / MIB:.1f} MiB while loading" if one.gpu_load_peak_bytes else ""
        lines.append(f"GPU memory {one.gpu_bytes / MIB:.1f} MiB{peak}")
    if one.energy_mj is not None and one.power_w is not None:
        lines.append(f"energy {one.energy_mj:.3g} mJ each, {one.power_w:.2f} W: {one.energy_of}")
    else:
        lines.append("energy: not reported by this board, or only to root")
    lines += _surroundings(one)
    if entry.agreement is not None:
        lines += _agreement(entry.agreement, len(entry.rounds))
    if entry.earlier is not None:
        lines.append(
            f"measured before on {entry.earlier.at}: p50 {entry.earlier.latency_p50_ms:.3g} ms, "
            f"now {entry.earlier.change:+.1%}"
        )
    return lines + [f"note: {note}" for note in one.notes]


def _surroundings(one: Measurement) -> list[str]:
    found = one.conditions
    if found is None:
        return []
    parts = []
    if found.others is not None:
        parts.append(f"other processes used {found.others:.2f} of {found.processors} processors")
    if found.celsius is not None:
        parts.append(f"{found.celsius[0]:.0f} to {found.celsius[1]:.0f} °C")
    if found.mhz is not None:
        parts.append(f"{found.mhz[0]:.0f} to {found.mhz[1]:.0f} MHz")
    parts += [f"governor {found.governor}"] if found.governor else []
    parts += [f"throttled: {word}" for word in found.throttled]
    parts += [f"since the board was started: {word}" for word in found.throttled_earlier]
    return [", ".join(parts)] if parts else []


def _agreement(found: Agreement, rounds: int) -> list[str]:
    apart = f"p50 {found.p50:.1%}, p95 {found.p95:.1%}, memory {found.memory:.1%} apart"
    if found.within:
        return [f"{rounds} rounds agree within {TOLERANCE:.0%}: {apart}"]
    return [f"{rounds} rounds differ by more than {TOLERANCE:.0%}: {apart}", *(f"  {why}" for why in found.reasons)]


def _compared(found: Comparison) -> list[str]:
    rows = (
        [
            f"time against {Path(found.base).name}, {found.rounds} rounds of turns in {found.sittings} processes, "
            f"{found.hardware} hardware:"
        ]
        if found.rows
        else []
    )
    for row in found.rows:
        verdict = ("faster" if row.ratio < 1 else "slower") if row.real else "no difference that is real"
        rows.append(f"  {Path(row.file).name}: {row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}], {verdict}")
    return rows + [f"  note: {note}" for note in found.notes]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def submission(report: Report, budget: Budget) -> bytes:
    """A file for others: the readable text and the figures, and nothing that tells whose device it is."""
    shared = without_folders(report)
    whole: Mapping[str, object] = {
        "readable": table(shared, budget).splitlines(),
        "report": msgspec.to_builtins(shared),
    }
    return msgspec.json.format(msgspec.json.encode(whole)) + b"\n"
