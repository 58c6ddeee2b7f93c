"""Made-up assessments of tasks, for the tests of choice, calibration and the store."""

from __future__ import annotations

from typing import Any

from kiridashi_server.similarity.assessment import STATISTICS, Assessment, AssessSettings


def make_assessment(
    name: str = "hues",
    *,
    gain: float = 0.1,
    similarities: dict[str, dict[str, float]] | None = None,
    composed: dict[str, float] | None = None,
    **changes: Any,
) -> Assessment:
    """A complete assessment with records "a", "b" and "c", of which "c" serves the task best."""
    values: dict[str, Any] = {
        "task": name,
        "task_digest": f"sha256:{name}",
        "backbone_fingerprint": "backbone",
        "layout_digest": "layout",
        "settings": AssessSettings(),
        "records": (f"record of {name}",),
        "own": 0.5,
        "utilities": {"a": 0.4, "b": 0.5, "c": 0.6},
        "compared": ("a", "b", "c"),
        "similarities": similarities or {"uniform": {"a": 0.0, "b": 0.0, "c": 0.0}},
        "composed": {"uniform": 0.5 + gain, **(composed or {})},
        "statistics": dict.fromkeys(STATISTICS, 0.0),
    }
    return Assessment(**{**values, **changes})
