"""What the device says is true: built from the journal alone, so that it holds whoever changed it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Literal

import kiridashi
import msgspec
from kiridashi.messages import MAX_CONTROL_BYTES, LineState, Reported, encode

from kiridashi_agent.journal import Journal, LineRecord
from kiridashi_agent.machine import resident_bytes
from kiridashi_agent.metadata import ClockError

# A process that only waits has no use for these; one of them loaded would cost tens of megabytes.
HEAVY_MODULES = (
    "ai_edge_litert",
    "jax",
    "numpy",
    "onnx",
    "onnxruntime",
    "PIL",
    "scipy",
    "tensorflow",
    "tflite_runtime",
    "torch",
)


def build_report(device: str, lines: Collection[str], journal: Journal) -> Reported:
    """The report of ``device``: every configured line, every line that the journal knows, the profile, and drift.

    The server takes no message over 64 KiB: of a larger report the examples of drift go first, then the trials of the
    files, then drift.
    """
    states = {line: LineState(phase="idle") for line in lines}
    states |= {line: record.state for line, record in journal.lines().items()}
    profile = journal.profile()
    report = Reported(
        device=device,
        generation=journal.device().generation,
        lines=states,
        agent_version=kiridashi.__version__,
        idle_rss_bytes=resident_bytes(),
        modules_forbidden_loaded=tuple(name for name in HEAVY_MODULES if name in sys.modules),
        probes=profile.state if profile else None,
        drift=journal.drift(),
    )
    return _fitting(report)


def waits_for(record: LineRecord) -> Literal["", "network", "clock"]:
    """What a line that does not rest waits for; empty if it works or rests. Pure."""
    error = record.state.error
    if record.state.phase not in ("fetching", "downloading") or error is None or error.phase != record.state.phase:
        return ""
    return "clock" if error.kind == ClockError.__name__ else "network"


def _fitting(report: Reported) -> Reported:
    replace = msgspec.structs.replace
    if len(encode(report)) > MAX_CONTROL_BYTES:
        bare = {
            line: replace(drift, findings=tuple(replace(finding, examples=()) for finding in drift.findings))
            for line, drift in report.drift.items()
        }
        report = replace(report, drift=bare)
    if len(encode(report)) > MAX_CONTROL_BYTES:
        report = replace(report, lines={line: replace(state, trials=()) for line, state in report.lines.items()})
    return report if len(encode(report)) <= MAX_CONTROL_BYTES else replace(report, drift={})
