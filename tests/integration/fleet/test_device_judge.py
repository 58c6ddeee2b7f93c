"""A device of the fleet as the judge of cuts, over a real registry and repository; the device itself is played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from fake_profile import DEVICE_CLASS, make_probes, report_of, timing
from kiridashi.budget import Budget, measure_against
from kiridashi.errors import InputError, StateError
from kiridashi.messages import ErrorReport, LineState, ProbesState, Reported, probes_path
from kiridashi.probes import ProbeSet
from kiridashi_server.budget.device import DeviceError
from kiridashi_server.device_judge import DeviceJudge, profile_of
from kiridashi_server.fleet.connection import BrokerAddress
from kiridashi_server.fleet.profiling import ReportDesk
from kiridashi_server.fleet.server import PlantServer
from tiny_science import SIDE, tiny_backbone

DEVICE = "cam-1"


@pytest.fixture
def server(tmp_path, device_request):
    server = PlantServer.init(tmp_path / "state", BrokerAddress("127.0.0.1", 8883))
    server.add_line("press-3")
    server.enrol(device_request(DEVICE), ["press-3"])
    yield server
    server.close()


@pytest.fixture
def probes(server, tmp_path) -> ProbeSet:
    """A published probe set; the device has answered it."""
    probes = make_probes(tmp_path / "probes", size=1000)
    server.publish_probes(tmp_path / "probes")
    server.request_profile([DEVICE], probes=probes.name)
    answer(server)
    return probes


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "work" / "candidate-0.onnx"
    path.parent.mkdir()
    path.write_bytes(b"a cut" * 100)
    return path


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def answer(server: PlantServer, ms: float = 2.0) -> None:
    """The device measures what it is asked for, at so many milliseconds, and reports."""
    request = server.registry.profiles.request_of(DEVICE)
    wanted = server.probe_set(request.probes)
    report = report_of(wanted, threads=request.threads)
    timings = tuple(
        msgspec.structs.replace(timing(one.name, ms), p99_ms=2 * ms, alone_runs=9) for one in report.timings
    )
    desk = ReportDesk(server.registry, server.repository.published, lambda: datetime.now(UTC))
    body = msgspec.json.encode(msgspec.structs.replace(report, timings=timings))
    desk.take_report(DEVICE, request.number, body)


def says(server: PlantServer, phase: str, error: str = "") -> None:
    """The device reports how far it is with its last request."""
    request = server.registry.profiles.request_of(DEVICE)
    found = ErrorReport("StateError", 60, error) if error else None
    state = ProbesState(probes_path(request.probes), request.number, phase, 1, 3, found)
    report = Reported(DEVICE, 1, {"press-3": LineState("idle")}, "0.1.0", probes=state)
    server.registry.record_report(report, datetime.now(UTC))


def judge_of(server: PlantServer, probes: ProbeSet, say: Callable[[str], None], timeout_s: float = 5.0) -> DeviceJudge:
    return DeviceJudge(server, DEVICE, probes, timeout_s=timeout_s, say=say, pause_s=0.01)


def number(server: PlantServer) -> int:
    return server.registry.profiles.request_of(DEVICE).number


def test_what_the_device_reports_is_the_measurement_and_no_profile(server, probes, file):
    before = server.profiles()
    lines = []

    def say(text: str) -> None:
        lines.append(text)
        answer(server, ms=4.0)

    (measured,) = judge_of(server, probes, say)([file])
    assert lines == ["cam-1: asked"]
    assert (measured.latency_p50_ms, measured.latency_p95_ms, measured.latency_p99_ms) == (4.4, 5.2, 8.0)
    assert (measured.quiet_ms, measured.runs, measured.file_bytes) == (4.0, 9, file.stat().st_size)
    assert server.profiles() == before
    assert [entry.name for entry in server.registry.profiles.probe_sets()] == [probes.name]
    # The newest probe set, which a request without a name takes, is the profile's too.
    assert server.request_profile([DEVICE]) == 1
    assert server.registry.profiles.request_of(DEVICE).probes == probes.digest


def test_every_repetition_is_a_request_of_its_own(server, probes, file):
    times = iter((8.0, 9.0, 5.0))
    judge = judge_of(server, probes, lambda _: answer(server, next(times)))

    def disturbed():
        (measured,) = judge([file])
        return msgspec.structs.replace(measured, quiet_ms=1.0)

    first = number(server)
    best = measure_against(Budget(latency_p95_ms=7.0), disturbed)
    assert best.latency_p95_ms == pytest.approx(5.0 * 1.3)
    assert "the quietest of 3 measurements" in best.notes
    assert number(server) == first + 3


def test_an_interrupted_run_finds_again_what_it_asked_for(server, probes, file):
    def interrupt(_text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_of(server, probes, interrupt)([file])
    asked = number(server)
    answer(server, ms=3.0)
    judge = judge_of(server, probes, lambda _: pytest.fail("it was asked again"))
    (measured,) = judge([file])
    assert (measured.quiet_ms, number(server)) == (3.0, asked)
    digest = server.registry.profiles.request_of(DEVICE).probes
    assert server.probe_set(digest).name.startswith("candidate-")
    judge.forget()
    with pytest.raises(StateError):
        server.probe_set(digest)
    again = judge_of(server, probes, lambda _: answer(server, ms=6.0))
    assert again([file])[0].quiet_ms == 6.0
    assert number(server) == asked + 1


def test_a_candidate_stays_signed_as_long_as_a_device_is_asked_for_it(server, probes, file, device_request):
    judge = judge_of(server, probes, lambda _: answer(server))
    judge([file])
    candidate = server.registry.profiles.request_of(DEVICE)
    server.enrol(device_request("cam-2"), ["press-3"])
    server.registry.profiles.ask(["cam-2"], replace(candidate, answered=None), datetime.now(UTC))
    judge.forget()
    assert server.probe_set(candidate.probes).digest == candidate.probes


def test_an_answer_of_the_day_before_yesterday_does_not_count(server, probes, file):
    judge_of(server, probes, lambda _: answer(server))([file])
    digest = server.registry.profiles.request_of(DEVICE).probes
    answers = server.registry.profiles.answers
    now = datetime.now(UTC)
    assert len(answers(DEVICE, digest, 1, now - timedelta(days=1))) == 1
    assert answers(DEVICE, digest, 1, now + timedelta(seconds=2)) == ()
    assert answers(DEVICE, digest, 2, now - timedelta(days=1)) == ()


def test_another_request_that_the_device_works_on_goes_first(server, probes, file):
    server.request_profile([DEVICE], probes=probes.name)
    first, lines = number(server), []

    def say(text: str) -> None:
        lines.append(text)
        answer(server)

    judge_of(server, probes, say)([file])
    assert lines == ["cam-1: another request first: asked", "cam-1: asked"]
    assert number(server) == first + 1
    assert len(server.profiles()) == 1


def test_what_the_device_cannot_measure_ends_the_wait_with_its_reason(server, probes, file):
    judge = judge_of(server, probes, lambda _: says(server, "failed", "no room on the disk"), timeout_s=60)
    with pytest.raises(DeviceError, match="'cam-1' could not measure") as caught:
        judge([file])
    assert caught.value.why == "no room on the disk"
    failed = number(server)
    judge_of(server, probes, lambda _: answer(server))([file])
    assert number(server) == failed + 1


def test_a_silent_device_is_described(server, probes, file):
    judge = judge_of(server, probes, lambda _: says(server, "measuring"), timeout_s=0.2)
    with pytest.raises(DeviceError, match=r"within 0\.2 s") as caught:
        judge([file])
    assert "it was never online, last heard of 20" in caught.value.why
    assert "stands at: measuring, 1 of 3 steps" in caught.value.why


class TestChoice:
    """Which of the class's profiles is taken."""

    @pytest.fixture
    def publish(self, server, tmp_path, backbone):
        """Publishes a probe set of the backbone, and has the device answer it."""

        def publish(name: str, side: int = SIDE, threads: int = 1) -> ProbeSet:
            folder = tmp_path / name
            made = make_probes(folder, graphs=4, size=1000, name=name)
            sizes = backbone.layout.sizes
            graphs = tuple(
                msgspec.structs.replace(graph, widths={key: max(1, size // (n + 1)) for key, size in sizes.items()})
                for n, graph in enumerate(made.graphs)
            )
            probes = msgspec.structs.replace(
                made,
                backbone_fingerprint=backbone.fingerprint,
                layout_digest=backbone.layout.digest,
                height=side,
                width=side,
                graphs=graphs,
            )
            (folder / "probes.json").write_bytes(probes.encode())
            server.publish_probes(folder)
            server.request_profile([DEVICE], probes=probes.digest, threads=threads)
            answer(server)
            return probes

        return publish

    def test_that_of_the_input_size_with_the_fewest_threads(self, server, publish, backbone):
        wanted = publish("tiny-16-onnxruntime")
        publish("tiny-16-onnxruntime", threads=2)
        publish("tiny-32-onnxruntime", side=32)
        assert len(server.profiles()) == 3
        probes, profile = profile_of(server, DEVICE, backbone)
        assert probes == wanted
        assert (profile.device_class, profile.threads) == (DEVICE_CLASS, 1)
        assert profile_of(server, DEVICE, backbone, threads=2)[1].threads == 2

    def test_what_there_is_is_named_when_none_fits(self, server, publish, backbone):
        with pytest.raises(InputError, match="no device 'cam-9'"):
            profile_of(server, "cam-9", backbone)
        with pytest.raises(InputError, match="has never reported a profile"):
            profile_of(server, DEVICE, backbone)
        publish("tiny-32-onnxruntime", side=32)
        with pytest.raises(InputError, match="no profile for tiny, 16 x 16 pixels, onnxruntime") as caught:
            profile_of(server, DEVICE, backbone)
        assert "tiny-32-onnxruntime, 1 thread(s)" in caught.value.why
        publish("tiny-16-onnxruntime")
        with pytest.raises(InputError, match="16 x 16 pixels, litert"):
            profile_of(server, DEVICE, backbone, runtime="litert")


def test_a_candidate_is_nobodys_probe_set(server, probes, file):
    judge_of(server, probes, lambda _: answer(server))([file])
    candidate = server.registry.profiles.request_of(DEVICE).probes
    with pytest.raises(InputError, match="no probe set"):
        server.request_profile([DEVICE], probes=candidate)
    # To forget is for candidates only.
    server.registry.profiles.forget(DEVICE, probes.digest)
    assert [profile.probe_set for profile in server.profiles()] == [probes.name]
