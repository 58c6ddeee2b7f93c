"""``kiridashi quickstart --quick``: killed, started again, finished; and what its report holds."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from installed import SERVER, Answer, call, environment, killed_at_the_end, wait_until_killed
from kiridashi.line import LineModel

TIMEOUT_S = 540
KILLED_AFTER = ("bank-roles-a", "bank-hands-a")
METHODS = {"one-shot", "uniform bank", "l1", "random", "task-specific iterative"}
REQUIRED = {
    "bank": {"task", "seconds", "accuracy"},
    "evidence": {"task", "similarity", "weight"},
    "results": {"method", "kept_params", "iterations", "accuracy", "seconds"},
    "artifacts": {"kind", "bytes", "sha256", "max_abs_diff", "top1_agreement"},
    "stages": {"name", "seconds"},
}
LIMITS = {"memory_bytes", "file_bytes", "latency_p95_ms"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)


def quickstart(out: Path, *words: str) -> Answer:
    return call(SERVER, "quickstart", "--quick", "--out", out, *words, timeout_s=TIMEOUT_S)


def when_finished(out: Path) -> dict[str, int]:
    """Every finished stage, with the time that its result was written."""
    kept = (path for path in out.glob("stages/*/stage.json") if path.parent.suffix != ".part")
    return {path.parent.name: path.stat().st_mtime_ns for path in kept}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, int]]:
    """The folder of a run that was killed and started again, its report, and what it had finished when killed."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    command = [str(SERVER), "quickstart", "--quick", "--out", str(out)]
    with (out.parent / "first.log").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    with killed_at_the_end(first):
        wait_until_killed(first, lambda: all((out / "stages" / name).is_dir() for name in KILLED_AFTER), 240)
    before = when_finished(out)
    assert not (out / "report.json").exists()
    code, report = quickstart(out)
    assert code == 0, report
    return out, report, before


@pytest.fixture
def report(finished) -> dict[str, Any]:
    return finished[1]


def test_the_second_start_goes_on_where_the_first_was_killed(finished) -> None:
    out, report, before = finished
    assert set(KILLED_AFTER) <= set(before)
    after = when_finished(out)
    assert {name: after[name] for name in before} == before  # the files are those of the killed run
    reused = {stage["name"] for stage in report["stages"] if stage["reused"]}
    assert reused == set(before)
    assert json.loads((out / "report.json").read_text()) == report
    assert not list(out.glob("stages/*.part"))


def test_the_report_has_every_field(report) -> None:
    for name, fields in REQUIRED.items():
        assert report[name], name
        assert [row for row in report[name] if not fields <= set(row)] == []
    assert {"groups", "kept_units", "params_before", "params_after"} <= set(report["plan"])
    assert set(report["budget"]) >= LIMITS
    assert set(report["measured"]) >= LIMITS | {"latency_p50_ms", "verdict"}
    assert {"bytes", "seconds", "chunks", "resumed"} <= set(report["delivery"])
    assert {"iterations", "seconds", "accuracy_before", "accuracy_after"} <= set(report["device"]["tune"])
    assert report["backbone"]["fingerprint"]
    assert report["machine"]
    assert (report["seed"], report["hardware"]) == (0, "real")


def test_the_plan_and_the_comparison_hold_together(report) -> None:
    plan = report["plan"]
    assert 0 < plan["params_after"] < plan["params_before"]
    assert 0 < plan["kept_units"] < plan["units"]
    assert len(report["bank"]) == len(report["evidence"]) == 3
    assert math.isclose(sum(row["weight"] for row in report["evidence"]), 1.0)
    assert {row["method"] for row in report["results"]} == METHODS
    assert len({row["iterations"] for row in report["results"]}) == 1
    sizes = [row["kept_params"] for row in report["results"]]
    assert max(sizes) <= 1.05 * min(sizes)
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in report["results"])
    assert all(row["seconds"] > 0 for row in (*report["results"], *report["bank"], *report["stages"]))


def test_the_device_kept_the_budget_and_serves_what_was_delivered(finished) -> None:
    out, report, _ = finished
    assert report["measured"]["verdict"] == "within"
    set_limits = {limit: value for limit, value in report["budget"].items() if value is not None}
    assert {"memory_bytes", "file_bytes"} <= set(set_limits)  # latency is left out, aloud, on a machine that is busy
    assert all(0 < report["measured"][limit] <= value for limit, value in set_limits.items())
    model = next(row for row in report["artifacts"] if row["kind"] == "onnx-fp32")
    assert model["bytes"] == report["measured"]["file_bytes"]
    assert model["max_abs_diff"] < 1e-3
    assert model["top1_agreement"] == 1.0
    delivery = report["delivery"]
    assert delivery["bytes"] == sum(row["bytes"] for row in report["artifacts"])
    assert delivery["broker"] == "mosquitto"
    device = report["device"]
    assert device["modules_forbidden_loaded"] == []
    assert 0 < device["idle_rss_bytes"] <= device["peak_rss_bytes"]
    assert device["tune"]["iterations"] > 0
    with LineModel.open("new-line", out / "device") as serving:
        assert serving.active.model_digest == device["model_digest"]
        assert serving.active.tuned == device["tune"]["kept"]
        assert serving.labels == tuple(report["labels"])


class References(HTMLParser):
    """What a page would load or link to, except for places in itself and data that it carries."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster") and value:
                self.outside += [] if value.startswith(("#", "data:")) else [value]


def test_the_page_needs_nothing_but_itself(finished) -> None:
    text = (finished[0] / "report.html").read_text()
    page = References()
    page.feed(text)
    assert page.outside == []
    assert page.images >= len(finished[1]["predictions"])
    imports = [piece[:40] for piece in text.split("url(")[1:] if not piece.strip("'\" ").startswith(("#", "data:"))]
    assert imports == []
    assert "@import" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")
def test_the_page_opens_in_a_browser(finished, tmp_path) -> None:
    page, picture = finished[0] / "report.html", tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,2400"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert picture.stat().st_size > 100_000  # a blank page of this size takes about 13 000
    assert "CONSOLE" not in done.stderr


def test_an_impossible_budget_names_the_limit_and_leaves_the_report(finished) -> None:
    out = finished[0]
    before = {name: (out / name).read_bytes() for name in ("report.json", "report.html")}
    code, answer = quickstart(out, "--budget", "memory=900MiB,file=1KiB,latency=900ms")
    error = answer["error"]
    assert (code, error["kind"], error["code"]) == (20, "BudgetError", 20)
    assert "the binding limit is file" in error["why"]
    assert "file=" in error["next"]
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("words", "code", "names"),
    [
        (("--task", "no-such-task"), 10, "no-such-task"),
        (("--task", "roles-a"), 10, "roles-a"),  # stands in the quick bank
        (("--budget", "speed=3"), 20, "speed"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(tmp_path, words, code, names) -> None:
    seen, answer = quickstart(tmp_path / "out", *words)
    assert (seen, answer["error"]["code"]) == (code, code)
    assert names in answer["error"]["what"]
    assert answer["error"]["next"]
    assert not (tmp_path / "out").exists()


def test_killed_in_the_middle_of_the_delivery_it_leaves_nobody_working(finished, tmp_path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for name in ("stages/deliver", "device", "server"):
        shutil.rmtree(out / name)
    with (tmp_path / "killed.log").open("wb") as log:
        command = [str(SERVER), "quickstart", "--quick", "--out", str(out)]
        killed = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    with killed_at_the_end(killed):
        wait_until_killed(killed, lambda: (out / "device" / "lines").is_dir(), 120)
    left = [int((out / name).read_text()) for name in ("device/agent.pid", "server/broker/broker.pid")]
    assert is_running(left[1])  # the agent may just have come to its end; the broker never does by itself
    try:
        code, report = quickstart(out)
        assert code == 0, report
        assert not any(map(is_running, left))
        assert {row["name"] for row in report["stages"] if not row["reused"]} == {"deliver", "predict"}
        assert report["measured"]["verdict"] == "within"
        assert not (out / "server" / "broker" / "broker.pid").exists()
    finally:
        for pid in filter(is_running, left):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
