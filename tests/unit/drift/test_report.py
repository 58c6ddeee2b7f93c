"""Findings on the wire and in words."""

from __future__ import annotations

import msgspec
import protocol_1_0 as old
import pytest
from kiridashi.drift.report import MAX_EXAMPLES, MAX_FINDINGS, Finding, LineDrift
from kiridashi.errors import InputError
from kiridashi.messages import MAX_CONTROL_BYTES, LineState, Reported, decode, encode

FINDING = Finding(
    "line", "image", "brightness", "lower (lowest 25%)", 0.0004, 0.34, 0.92, 0.47, 0.39, 26, 900, 1.0e9, 1.1e9
)


def reported(lines: int, findings: int) -> Reported:
    named = msgspec.structs.replace(FINDING, statistic="x" * 63, examples=("r" * 64,) * MAX_EXAMPLES)
    watch = LineDrift("watching", "sha256:" + "0" * 64, 400, 400, 12, 10**9, (named,) * findings)
    names = [f"{n:03d}-{'x' * 40}" for n in range(lines)]
    return Reported("cam-1", 3, dict.fromkeys(names, LineState("active")), "0.1.0", drift=dict.fromkeys(names, watch))


def test_findings_survive_the_wire_and_fit_into_a_report_of_eight_lines() -> None:
    worst = reported(lines=8, findings=MAX_FINDINGS)
    assert len(encode(worst)) < MAX_CONTROL_BYTES
    assert decode(encode(worst), Reported) == worst
    with pytest.raises(InputError):
        decode(encode(reported(lines=1, findings=MAX_FINDINGS + 1)), Reported)


def test_a_server_of_1_0_overlooks_drift_and_a_device_of_1_0_reports_none() -> None:
    said = reported(lines=1, findings=1)
    assert old.decode(encode(said), old.Reported).device == "cam-1"
    older = old.Reported("cam-1", 3, {}, "0.1.0")
    assert decode(msgspec.json.encode(older), Reported).drift == {}


def test_a_finding_says_what_changed_since_when_and_how_sure_that_is() -> None:
    assert FINDING.text == (
        "image: brightness lower (lowest 25%) since the model became active, 0.47 then, 0.39 now; "
        "92% of 26 frames where at most 34% were to be expected, p 0.0004"
    )
    server = msgspec.structs.replace(FINDING, reference="server")
    assert "than the server's samples, 0.47 there, 0.39 here" in server.text
