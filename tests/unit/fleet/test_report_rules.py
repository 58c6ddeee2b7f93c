"""Which reports a server believes."""

from __future__ import annotations

import msgspec
import pytest
from fake_profile import make_probes, report_of, timing
from kiridashi.errors import InputError
from kiridashi_server.fleet.profiling import check_report

replace = msgspec.structs.replace


@pytest.fixture
def probes(tmp_path):
    return make_probes(tmp_path, size=100)


def test_a_report_of_all_graphs_or_of_some_is_believed(probes):
    check_report(report_of(probes), probes, threads=1)
    check_report(report_of(probes, ["probe-001.onnx"]), probes, threads=1)


TIMES = ("quiet_ms", "anchor_ms", "p50_ms", "p95_ms", "load_ms", "halves_ms")
NO_TIME = (0.0, -1.0, float("nan"), float("inf"), float("-inf"))
BAD = [(field, value) for field in TIMES for value in NO_TIME]
BAD += [("runs", 0), ("memory_bytes", -1), ("alone_runs", -1), *(("p99_ms", value) for value in NO_TIME[1:])]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_numbers_that_no_measurement_gives(probes, field, value):
    bad = replace(timing("probe-001.onnx"), **{field: (2.0, value) if field == "halves_ms" else value})
    report = report_of(probes)
    report = replace(report, timings=(report.timings[0], bad, report.timings[2]))
    with pytest.raises(InputError, match=r"refused.*'probe-001\.onnx' is not positive and finite"):
        check_report(report, probes, threads=1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"timings": ()}, "nothing was measured"),
        ({"timings": (timing("strange.onnx"),)}, "does not have"),
        ({"timings": (timing("probe-001.onnx"),) * 2, "complete": False}, "twice"),
        ({"timings": (timing("probe-001.onnx"),)}, "complete, and is not"),
        ({"threads": 4}, "4 threads instead of 1"),
        ({"device_class": ""}, "device class"),
        ({"device_class": "x" * 201}, "device class"),
        ({"device_class": "a\x1b[2J"}, "cannot be printed"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": -1.0}, "seconds"),
    ],
)
def test_what_does_not_fit_the_request(probes, change, why):
    with pytest.raises(InputError, match=why):
        check_report(replace(report_of(probes), **change), probes, threads=1)
