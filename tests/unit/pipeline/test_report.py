"""The report: every number on the page, nothing from outside, what is hostile escaped."""

import html
import re
from pathlib import Path

import msgspec
import pytest
from kiridashi.budget import Budget
from kiridashi_server.report.page import write_page
from kiridashi_server.report.schema import (
    ArtifactEntry,
    BackboneEntry,
    BankEntry,
    DeliveryEntry,
    DenseEntry,
    DeviceEntry,
    EvidenceEntry,
    MeasuredEntry,
    PlanEntry,
    PredictionEntry,
    Report,
    ResultEntry,
    StageEntry,
    TuneEntry,
)

NEEDS = {
    "memory_bytes": 75 << 20,
    "file_bytes": 4 << 20,
    "latency_p50_ms": 0.6,
    "latency_p95_ms": 0.71,
    "latency_p99_ms": 0.9,
    "load_ms": 30.0,
    "runs": 2000,
    "runtime": "onnxruntime",
    "threads": 1,
    "hardware": "real",
}


def result(method: str, size: int, accuracy: float) -> ResultEntry:
    return ResultEntry(
        method=method,
        kept_params=size,
        kept_share=size / 3e6,
        macs=10_000_000,
        iterations=20,
        extra_iterations=0,
        accuracy=accuracy,
        low=accuracy - 0.05,
        high=accuracy + 0.05,
        seconds=8.0,
        gain=0.05,
        gain_low=-0.01,
        gain_high=0.1,
    )


@pytest.fixture
def report() -> Report:
    return Report(
        task="roles-b",
        labels=("a", "b"),
        seed=0,
        hardware="real",
        machine="a machine, 2 cores",
        backbone=BackboneEntry("efficientnet-lite0", "ab" * 32, 3_371_008, 24),
        bank=(BankEntry("sports", 25.0, 0.7, 96), BankEntry("goods", 20.0, 0.6, 96)),
        measure="loo-leep",
        verdict="reuse",
        explanation=("both records help",),
        evidence=(EvidenceEntry("sports", -1.9, 0.5), EvidenceEntry("goods", -2.0, 0.5)),
        plan=PlanEntry(24, 3000, 9000, 3_371_008, 1_001_000, "latency", 1, 31_000_000, 11_000_000),
        results=tuple(
            result(method, size, accuracy)
            for method, accuracy in (("one-shot", 0.62), ("l1", 0.47))
            for size in (1_600_000, 1_001_000)
        ),
        artifacts=(ArtifactEntry("onnx-fp32", "model.onnx", 4_039_786, "c" * 64, 1.5e-6, 1.0),),
        dropped=("tflite-int8: it agrees on 85 % only",),
        budget=Budget(90 << 20, 5 << 20, 0.9),
        measured=MeasuredEntry(**NEEDS, verdict="within", artifact="model.onnx"),
        dense=DenseEntry(memory_bytes=112_000_000, file_bytes=13_400_000, latency_p50_ms=1.9, latency_p95_ms=2.13),
        device=DeviceEntry(
            modules_forbidden_loaded=(),
            idle_rss_bytes=30 << 20,
            peak_rss_bytes=120 << 20,
            tune=TuneEntry(30, 4.0, 72, 96, 0.5, 0.55, 0.61, True, "better"),
            test_accuracy_delivered=0.52,
            test_accuracy_active=0.603,
            model_digest="sha256:" + "d" * 64,
        ),
        delivery=DeliveryEntry(12 << 20, 0.9, 48, 3, "mosquitto"),
        stages=(StageEntry("bank-sports", 25.0, True), StageEntry("evidence", 0.7, False)),
        predictions=(PredictionEntry("data:image/png;base64,AAAA", "a", "b", 0.8),),
        notes=("<script>alert(1)</script>",),
    )


def page_of(report: Report, folder: Path) -> str:
    write_page(report, folder / "report.html")
    return (folder / "report.html").read_text()


def test_the_page_has_the_measured_numbers(report: Report, tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", html.unescape(page_of(report, tmp_path)))
    for number in ("29.7 %", "60.3 %", "2.13 ms", "0.71", "1.5e-06", "75.00 MiB of 90.00 MiB", "3 resumed"):
        assert number in text
    assert "inside the budget" in text


def test_the_page_loads_nothing_and_runs_nothing(report: Report, tmp_path: Path) -> None:
    page = page_of(report, tmp_path)
    fetched = re.findall(r'(?:src|href)="([^"#]*)"', page)
    assert fetched
    assert all(address.startswith("data:") for address in fetched)
    assert "<script" not in page.lower()
    assert "default-src 'none'" in page


def test_the_same_report_gives_the_same_page(report: Report, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    assert page_of(report, tmp_path) == page_of(report, tmp_path / "again")


def test_a_model_over_its_budget_is_shown_as_such(report: Report, tmp_path: Path) -> None:
    over = msgspec.structs.replace(
        report,
        budget=Budget(latency_p95_ms=0.5),
        measured=MeasuredEntry(**NEEDS, verdict="exceeded", artifact="model.onnx"),
    )
    page = page_of(over, tmp_path)
    assert "over the budget" in page
    assert 'class="over"' in page


def test_json_and_report_are_inverse(report: Report) -> None:
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
