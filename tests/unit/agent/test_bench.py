"""Rounds, comparison, history and report of measured files, over scripted child processes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import socket
from pathlib import Path

import msgspec
import pytest
from kiridashi.budget import MIB, Budget, Conditions, Measurement
from kiridashi.errors import InputError, StateError
from kiridashi_agent.agreement import agreement
from kiridashi_agent.bench import BenchSettings, compare_files, measure_files, summed_up
from kiridashi_agent.bench_report import Comparison, Report, history_table, submission, table, to_csv
from kiridashi_agent.cli import measure as command
from kiridashi_agent.history import MAX_ENTRIES, NAME, Entry, add_to_history, last_like, read_history
from kiridashi_agent.jobs import Interleaved, Ratio
from kiridashi_agent.process import MemoryLimitError

QUIET = Conditions(seconds=2.0, processors=4, others=0.02, mhz=(1800.0, 1800.0), celsius=(50.0, 51.0))
ONE = Measurement(
    memory_bytes=60 * MIB,
    file_bytes=1000,
    latency_p50_ms=10.0,
    latency_p95_ms=12.0,
    latency_p99_ms=14.0,
    load_ms=30.0,
    runs=200,
    runtime="onnxruntime 1.32.0",
    threads=1,
    hardware="real",
    provider="cpu",
    p50_ci_ms=(9.9, 10.1),
    p95_ci_ms=(11.8, 12.2),
    independent_runs=90,
    conditions=QUIET,
)


def changed(one: Measurement = ONE, **fields: object) -> Measurement:
    surroundings = {name: fields.pop(name) for name in list(fields) if name in Conditions.__struct_fields__}
    assert one.conditions is not None
    conditions = msgspec.structs.replace(one.conditions, **surroundings)
    return msgspec.structs.replace(one, conditions=conditions, **fields)


SLOWER = {"latency_p50_ms": 11.0, "latency_p95_ms": 13.5, "p50_ci_ms": (10.9, 11.1), "p95_ci_ms": (13.2, 13.8)}


@pytest.mark.parametrize(
    ("second", "reasons"),
    [
        (changed(latency_p50_ms=10.4, others=3.0), ()),
        (
            changed(**SLOWER, others=1.5),
            ("other processes kept 1.5 of 4 processors busy in the slower round, 0.0 in the quicker",),
        ),
        (changed(**SLOWER, throttled=("under-voltage",)), ("throttled in the slower round: under-voltage",)),
        (
            changed(**SLOWER, stolen=0.4),
            ("the hypervisor gave 0.40 processors to other machines in the slower round",),
        ),
        (
            changed(**SLOWER, mhz=(1800.0, 1200.0), governor="ondemand"),
            ("the clock rate went between 1200 and 1800 MHz (governor ondemand)",),
        ),
        (changed(**SLOWER, celsius=(51.0, 70.0)), ("the board was between 50 and 70 °C",)),
        (changed(**SLOWER, preempted=40), ("the kernel interrupted the slower round 40 times in 200 runs",)),
        (
            changed(memory_bytes=66 * MIB),
            ("peak memory differs: 60.0 and 66.0 MiB; memory was allocated differently",),
        ),
        (
            changed(latency_p95_ms=13.0, p95_ci_ms=(12.1, 14.0), independent_runs=40),
            ("the intervals overlap: runs worth 40 independent ones are too few to tell them apart",),
        ),
        (changed(**SLOWER), ("unexplained: nothing that the board reports changed between the rounds",)),
    ],
)
def test_two_measurements_agree_or_it_is_said_why_not(second: Measurement, reasons: tuple[str, ...]) -> None:
    for found in (agreement(ONE, second), agreement(second, ONE)):
        assert found.reasons == reasons
        assert found.within == (not reasons)


def test_older_measurements_without_surroundings_can_be_compared() -> None:
    bare = msgspec.structs.replace(changed(**SLOWER), conditions=None, p50_ci_ms=None, p95_ci_ms=None)
    assert agreement(ONE, bare).reasons[0].startswith("unexplained")


class FakeMeasuring:
    """Answers each measurement in turn; ``ratios`` are those of every sitting."""

    def __init__(self, *answers: Measurement, ratios: tuple[Ratio, ...] = (), failure: Exception | None = None) -> None:
        self.answers, self.ratios, self.failure = list(answers), ratios, failure
        self.requests: list = []
        self.limits: list = []

    def measure(self, request, limits):
        self.requests.append(request)
        self.limits.append(limits)
        return self.answers[(len(self.requests) - 1) % len(self.answers)]

    def interleave(self, request, limits):
        self.requests.append(request)
        if self.failure:
            raise self.failure
        return Interleaved({}, 100, ratios=self.ratios)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def silent(_text: str) -> None:
    return None


def test_rounds_go_back_and_forth_and_the_quicker_one_counts(files) -> None:
    jobs = FakeMeasuring(changed(**SLOWER), ONE)
    settings = BenchSettings(threads=2, memory_bytes=80 * MIB, shapes=(("x", (1, 3)),))
    found = measure_files(files, settings, Budget(), (), jobs, silent)
    assert [Path(request.folder).name for request in jobs.requests] == ["a.onnx", "b.onnx", "b.onnx", "a.onnx"]
    assert {request.threads for request in jobs.requests} == {2}
    assert jobs.requests[0].shapes == {"x": (1, 3)}
    assert {limits.memory_bytes for limits in jobs.limits} == {80 * MIB}
    assert [entry.measured for entry in found] == [ONE, ONE]
    assert all(len(entry.rounds) == 2 and not entry.agreement.within for entry in found)


def test_a_single_round_says_nothing_of_repeatability(files) -> None:
    (entry,) = measure_files(files[:1], BenchSettings(rounds=1), Budget(memory_bytes=1), (), FakeMeasuring(ONE), silent)
    assert entry.agreement is None
    assert entry.verdict.exceeded == ("memory",)


def test_a_difference_is_real_when_every_sitting_shows_it(files) -> None:
    sure, unsure = Ratio(1.2, 1.15, 1.25), Ratio(1.02, 0.99, 1.05)
    sittings = [Interleaved({}, 50, ratios=(sure, sure)), Interleaved({}, 40, ratios=(Ratio(1.1, 1.05, 1.2), unsure))]
    found = summed_up(["a", "b", "c"], sittings)
    assert (found.base, found.sittings, found.rounds) == ("a", 2, 90)
    first, second = found.rows
    assert (first.low, first.high, first.real) == (1.05, 1.25, True)
    assert first.ratio == pytest.approx((1.2 * 1.1) ** 0.5)
    assert (second.low, second.high, second.real) == (0.99, 1.25, False)


def test_files_that_do_not_fit_together_are_not_compared_and_it_says_so(files) -> None:
    jobs = FakeMeasuring(failure=MemoryLimitError("needs more memory", why="Traceback: /home/somebody"))
    found = compare_files(files, BenchSettings(), jobs, silent)
    assert found.rows == ()
    assert "needs more memory" in found.notes[0]
    assert "somebody" not in found.notes[0]
    jobs = FakeMeasuring(ratios=(Ratio(2.0, 1.9, 2.1),))
    assert compare_files(files, BenchSettings(), jobs, silent).rows[0].real
    assert {request.seed for request in jobs.requests} == {0, 1, 2}
    assert all(request.compare and request.graphs == tuple(map(str, files)) for request in jobs.requests)


def report(
    files: list[Path], *answers: Measurement, history: tuple[Entry, ...] = (), budget: Budget | None = None
) -> Report:
    jobs = FakeMeasuring(*answers or (ONE,))
    entries = measure_files(files, BenchSettings(), budget or Budget(), history, jobs, silent)
    ratios = FakeMeasuring(ratios=(Ratio(1.2, 1.1, 1.3),))
    machine = {"board": "Test Board", "processors": 4, "memory_mib": 4096, "kernel": "6.1", "virtual": "kvm"}
    return Report(
        agent_version="1",
        day="2026-01-02",
        hardware="emulated",
        machine=machine,
        runtimes={"onnxruntime": "onnxruntime 1.32.0"},
        budget="unlimited",
        files=entries,
        comparison=compare_files(files, BenchSettings(), ratios, silent) if len(files) > 1 else None,
    )


def test_the_table_has_every_figure_with_its_hardware(files, monkeypatch) -> None:
    monkeypatch.setenv("KIRIDASHI_HARDWARE", "emulated")
    answer = changed(
        gpu_bytes=5 * MIB,
        gpu_load_peak_bytes=9 * MIB,
        energy_mj=40.0,
        power_w=4.0,
        energy_of="the board's rail VDD_IN, idle power included",
        hardware="emulated",
        timed="model",
        throttled_earlier=("under-voltage",),
    )
    budget = Budget(latency_p95_ms=5.0)
    text = table(report(files, answer, budget=budget), budget)
    assert text.count("emulated") >= 4  # each file's row, the comparison, the machine
    for part in (
        "10 [9.9, 10.1]",
        "GPU memory 5.0 MiB, 9.0 MiB while loading",
        "energy 40 mJ each, 4.00 W: the board's rail VDD_IN",
        "over the budget: p95 12 ms of 5 ms",
        "the runtime's call alone",
        "since the board was started: under-voltage",
        "2 rounds agree within 5%",
        "b.onnx: 1.200 [1.100, 1.300], slower",
        "Test Board, 4 processors, 4096 MiB, kernel 6.1, emulated hardware, virtual machine (kvm)",
    ):
        assert part in text
    assert "energy: not reported" in table(report(files), Budget())


def test_csv_has_one_row_for_each_file_and_is_empty_where_nothing_is_known(files) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(report(files)))))
    assert [row["file"] for row in rows] == list(map(str, files))
    assert (rows[0]["latency_p50_ms"], rows[0]["p50_ci_ms_low"], rows[0]["p99_ci_ms_low"]) == ("10.0", "9.9", "")
    assert (rows[0]["hardware"], rows[0]["energy_mj"], rows[0]["celsius_after"]) == ("real", "", "51.0")
    assert (rows[0]["ratio"], rows[1]["ratio"]) == ("", "1.2")
    fuller = changed(p99_ci_ms=(1.0, 2.0), throttled=("a", "b"), virtual="kvm")
    more = list(csv.DictReader(io.StringIO(to_csv(report(files, ONE, fuller)))))
    assert set(more[0]) == set(rows[0])


def test_a_submission_tells_the_figures_and_not_whose_they_are(tmp_path, files) -> None:
    history = (Entry("2025-01-01T00:00:00Z", "a.onnx", "x", "1", ONE),)
    data = submission(report(files, history=history), Budget())
    found = json.loads(data)
    assert found["report"]["format"] == "kiridashi-measure/1"
    assert [entry["file"] for entry in found["report"]["files"]] == ["a.onnx", "b.onnx"]
    assert found["report"]["files"][0]["measured"]["latency_p50_ms"] == 10.0
    assert "a.onnx" in found["readable"][1]
    text = data.decode()
    assert str(tmp_path) not in text
    assert socket.gethostname() not in re.findall(r"[\w.-]+", text)
    assert os.fspath(Path.home()) not in text


def entry(n: int, sha256: str = "x", **fields: object) -> Entry:
    return Entry(f"2026-01-01T00:00:{n:02d}Z", "a.onnx", sha256, "1", changed(**fields))


def test_history_is_bounded_and_survives_a_torn_line(tmp_path) -> None:
    assert read_history(tmp_path) == ()
    add_to_history(tmp_path, [entry(1)])
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"at": "2026')
    assert read_history(tmp_path) == (entry(1),)
    many = [entry(n % 60, latency_p50_ms=float(n)) for n in range(1, MAX_ENTRIES + 6)]
    add_to_history(tmp_path, many)
    kept = read_history(tmp_path)
    assert len(kept) == MAX_ENTRIES
    assert kept[-1] == many[-1]
    with pytest.raises(StateError, match="no state folder"):
        add_to_history(tmp_path / "none", [entry(1)])
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(StateError, match="cannot be read"):
        read_history(tmp_path)


def test_only_the_same_file_measured_in_the_same_way_is_held_against() -> None:
    history = (entry(1, latency_p50_ms=8.0), entry(2, latency_p50_ms=9.0), entry(3, threads=4), entry(4, "y"))
    assert last_like(history, "x", ONE) == history[1]
    assert last_like(history, "x", changed(provider="cuda")) is None
    assert last_like(history, "z", ONE) is None


def test_the_change_since_the_last_time_is_told(files) -> None:
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    history = (Entry("2026-01-01T00:00:00Z", "a.onnx", digest, "1", changed(latency_p50_ms=8.0)),)
    text = table(report(files[:1], history=history), Budget())
    assert "measured before on 2026-01-01T00:00:00Z: p50 8 ms, now +25.0%" in text


def test_history_as_a_table_and_as_csv() -> None:
    assert history_table([]) == "nothing has been measured on this device yet"
    assert "2026-01-01T00:00:01Z  a.onnx" in history_table([entry(1)])
    rows = list(csv.DictReader(io.StringIO(history_table([entry(1)], as_csv=True))))
    assert (rows[0]["p50 ms"], rows[0]["hardware"]) == ("10", "real")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1x3x224x224", ("x", (1, 3, 224, 224))),
        ("1x3", ("", (1, 3))),
        ("serving_default_x:0=7", ("serving_default_x:0", (7,))),
        ("a=b=2x2", ("a=b", (2, 2))),
    ],
)
def test_shapes_are_read(text, expected) -> None:
    assert command.parse_shape(text) == expected


@pytest.mark.parametrize("text", ["", "x=", "x=1x", "x=1xa", "x=-1x3", "x=1x0", "x=1,3"])
def test_what_is_no_shape_is_refused(text) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        command.parse_shape(text)


def test_a_comparison_without_rows_prints_its_note(files) -> None:
    broken = msgspec.structs.replace(
        report(files), comparison=Comparison("a", 0, 0, "real", notes=("the files could not be compared",))
    )
    assert "note: the files could not be compared" in table(broken, Budget())
