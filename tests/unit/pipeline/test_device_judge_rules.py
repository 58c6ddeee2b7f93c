"""What a candidate travels as, and what the device's report of it says."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest
from fake_profile import make_probes, report_of
from kiridashi.command import main
from kiridashi.errors import ExitCode, InputError
from kiridashi.probes import ProbeReport, Timing, decode_probe_report, decode_probe_set
from kiridashi_agent.profile_record import Alone
from kiridashi_server.cli import cut
from kiridashi_server.cli.judge_source import judged_by
from kiridashi_server.device_judge import candidate_set, to_measurement

TIMING = Timing("candidate-0.onnx", 2.0, (2.0, 2.1), 2.0, 300, 2.2, 2.6, 50_000_000, 4.0, p99_ms=2.9, alone_runs=120)


@pytest.fixture
def report(tmp_path: Path) -> ProbeReport:
    probes = make_probes(tmp_path, graphs=1, size=100)
    return msgspec.structs.replace(report_of(probes), timings=(TIMING,), notes=("load 1.9",))


def test_every_number_of_the_measurement_is_the_devices(report: ProbeReport) -> None:
    measured = to_measurement(report, 1234)
    assert (measured.memory_bytes, measured.file_bytes, measured.load_ms) == (50_000_000, 1234, 4.0)
    assert (measured.latency_p50_ms, measured.latency_p95_ms, measured.latency_p99_ms) == (2.2, 2.6, 2.9)
    assert (measured.quiet_ms, measured.runs, measured.threads) == (2.0, 120, 1)
    assert (measured.runtime, measured.hardware, measured.notes) == (report.runtime, "real", ("load 1.9",))


def test_an_older_agents_report_is_read_and_says_what_it_lacks(report: ProbeReport) -> None:
    plain = msgspec.to_builtins(report)
    for name in ("p99_ms", "alone_runs"):
        del plain["timings"][0][name]
    older = decode_probe_report(msgspec.json.encode(plain))
    measured = to_measurement(older, 1234)
    assert (measured.latency_p99_ms, measured.runs) == (0.0, 300)
    assert measured.notes == ("load 1.9", "the device's agent does not tell the 99th percentile")


def test_an_older_record_is_read() -> None:
    older = b'{"p50_ms": 1.0, "p95_ms": 2.0, "memory_bytes": 3, "load_ms": 4.0, "start_s": 5.0}'
    assert msgspec.json.decode(older, type=Alone) == Alone(1.0, 2.0, 3, 4.0, 5.0, p99_ms=0.0, runs=0)


def test_the_same_file_gives_the_same_candidate(tmp_path: Path) -> None:
    probes = make_probes(tmp_path / "probes", size=100)
    digests = []
    for number, content in enumerate((b"one", b"one", b"two")):
        file = tmp_path / str(number) / "candidate-0.onnx"
        file.parent.mkdir()
        file.write_bytes(content)
        candidate = candidate_set(probes, file)
        assert decode_probe_set(candidate.encode()) == candidate
        digests.append(candidate.digest)
    assert digests[0] == digests[1] != digests[2]
    assert candidate.name.startswith("candidate-")
    assert (candidate.backbone_fingerprint, candidate.height) == (probes.backbone_fingerprint, probes.height)


@pytest.mark.parametrize("words", [{"runtime": "litert"}, {"threads": 2}])
def test_a_choice_among_a_devices_profiles_needs_the_device(words: dict[str, object]) -> None:
    arguments = argparse.Namespace(**{"device": None, "runtime": None, "threads": None, **words})
    with pytest.raises(InputError, match="--device"), judged_by(arguments, None, print):
        pass


def test_a_file_and_a_device_cannot_both_be_the_profile() -> None:
    words = ["cut", "--task", "t", "--line", "l", "-o", "o", "--profile", "p", "--device", "d"]
    with pytest.raises(SystemExit) as caught:
        main("kiridashi", "", cut.COMMANDS, words)
    assert caught.value.code == ExitCode.USAGE
