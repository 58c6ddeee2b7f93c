"""A profile that was asked for: the steps, what interrupts them, what ends them."""

from __future__ import annotations

import threading

import msgspec
import pytest
from agent_program import wait_for
from fake_device import Device, Killed
from fake_profile import make_probes
from kiridashi.errors import BundleError, RuntimeUnavailableError
from kiridashi.messages import MAX_CONTROL_BYTES, ProbesDesired, ProbesState, probes_path
from kiridashi.probes import MAX_SECONDS
from kiridashi_agent.journal import ProfileRecord
from kiridashi_agent.profile_task import adopted

V1 = "lines/press-3/1.json"


@pytest.fixture
def probes(tmp_path, fleet):
    folder = tmp_path / "probes"
    made = make_probes(folder)
    fleet.publish_probes(folder, made)
    return made


@pytest.fixture
def wanted(probes) -> ProbesDesired:
    return ProbesDesired(probes_path(probes.digest), 1, 60.0, 2)


def profile(device: Device) -> ProbesState | None:
    record = device.journal.profile()
    return record.state if record else None


def work(device: Device, wanted: ProbesDesired | None) -> ProbesState | None:
    """Take the wish and work in this thread, so that what is thrown arrives here."""
    device.task.adopt(wanted)
    device.task.run(threading.Event())
    return profile(device)


def left(device: Device) -> list[str]:
    return sorted(path.name for path in (device.state / "probes").rglob("*") if path.is_file())


def test_fetched_measured_handed_over_and_cleared_up(device, probes, wanted) -> None:
    state = work(device, wanted)
    assert (state.phase, state.done, state.total, state.error) == ("sent", 0, 0, None)
    ((number, report),) = device.fleet.reports
    assert (number, report.probes, report.threads, report.complete) == (1, probes.digest, 2, True)
    assert [timing.name for timing in report.timings] == [graph.artifact.name for graph in probes.graphs]
    assert left(device) == []
    told = [f"profile-{phase}" for phase in ("fetching", "measuring", "sending", "sent")]
    assert [name for name, _ in device.transport.events] == told


def test_the_agent_does_it_beside_its_loop_and_reports(device, wanted) -> None:
    device.transport.want(1, probes=wanted, press_3=V1)
    report = device.agent.run_until_settled(20)
    assert report.lines["press-3"].phase == "active"
    assert report.probes.phase == "sent"
    assert device.transport.states[-1].probes == report.probes
    assert device.measure_probes.threads == ["kiridashi-profile"]
    device.transport.want(2, press_3=V1)  # answered: nothing is wanted any more, and what was done stays known
    device.agent.tick(0)
    assert profile(device).phase == "sent"


def test_the_class_that_the_configuration_names_is_reported(device, wanted) -> None:
    named = msgspec.structs.replace(device.config.device, device_class="press-camera")
    device.config = msgspec.structs.replace(device.config, device=named)
    device.restart()
    work(device, wanted)
    assert device.fleet.reports[0][1].device_class == "press-camera"


def test_the_same_wish_again_measures_nothing_and_another_number_measures_again(device, wanted) -> None:
    work(device, wanted)
    work(device, wanted)
    assert len(device.fleet.reports) == 1
    work(device, msgspec.structs.replace(wanted, request=2))
    assert [number for number, _ in device.fleet.reports] == [1, 2]
    assert len(device.measure_probes.measured) == 6


def test_a_new_version_goes_first_and_measuring_goes_on_afterwards(device, wanted) -> None:
    device.measure_probes.pause_s = 0.3
    device.transport.want(1, probes=wanted)
    wait_for(lambda: device.agent.tick(0) or device.measure_probes.measured)
    device.transport.want(2, probes=wanted, press_3=V1)
    device.agent.tick(0)
    assert device.line.phase == "active"
    assert profile(device).phase == "measuring"
    assert device.measure_probes.starts == 1
    assert not any(thread.name == "kiridashi-profile" for thread in threading.enumerate())
    report = device.agent.run_until_settled(20)
    assert report.probes.phase == "sent"
    assert sorted(set(device.measure_probes.measured)) == sorted(device.measure_probes.measured)
    assert device.journal.profile().attempts == 0


def test_nothing_is_measured_while_a_line_waits_for_the_server(device, wanted) -> None:
    device.transport.offline = True
    device.transport.want(1, probes=wanted, press_3=V1)
    for _ in range(3):
        device.agent.tick(0)
    assert profile(device).phase == "waiting"
    device.transport.offline = False
    assert device.agent.run_until_settled(20).probes.phase == "sent"


@pytest.mark.parametrize("raises", [True, False])
def test_an_interruption_on_purpose_is_no_attempt(device, wanted, raises) -> None:
    cancel = threading.Event()
    device.measure_probes.raises = raises
    device.measure_probes.before = lambda _: cancel.set()
    device.task.adopt(wanted)
    for _ in range(5):
        cancel.clear()
        device.task.run(cancel)
    assert (profile(device).phase, device.journal.profile().attempts) == ("measuring", 0)
    assert device.fleet.reports == []
    device.measure_probes.before = None
    assert work(device, wanted).phase == "sent"


def test_starts_share_the_time_and_the_last_one_gets_a_little(device, wanted) -> None:
    cancel = threading.Event()
    device.measure_probes.pause_s = 0.2
    device.measure_probes.before = lambda _: threading.Timer(0.1, cancel.set).start()
    device.task.adopt(msgspec.structs.replace(wanted, seconds=1.15))
    for _ in range(3):
        cancel.clear()
        device.task.run(cancel)
    first, second, third = device.measure_probes.seconds
    assert first == 1.15
    assert first - 0.15 < second + 0.01
    assert 1.0 <= second < first
    assert third == 1.0


class TestCrashes:
    """``Killed`` stands for the end of the process at that place; a new one starts on the same folder."""

    def test_killed_while_fetching(self, device, wanted, monkeypatch) -> None:
        seen = []

        def die(request, data):
            seen.append(request)
            if request.method == "chunk" and len(seen) > 8:
                raise Killed
            return data

        device.fleet.intercept = die
        with pytest.raises(Killed):
            work(device, wanted)
        assert profile(device).phase == "fetching"
        device.fleet.intercept = lambda _, data: data
        device.restart()
        before = set(device.fleet.chunk_requests())
        device.fleet.requests.clear()
        assert work(device, wanted).phase == "sent"
        again = set(device.fleet.chunk_requests())
        assert len(before & again) < len(before)

    def test_killed_while_measuring_it_goes_on_through_the_record(self, device, probes, wanted) -> None:
        names = [graph.artifact.name for graph in probes.graphs]

        def die(name):
            if name == names[2]:
                raise Killed

        device.measure_probes.before = die
        with pytest.raises(Killed):
            work(device, wanted)
        assert (profile(device).phase, device.journal.profile().attempts) == ("measuring", 1)
        device.restart()
        device.measure_probes.before = None
        assert work(device, wanted).phase == "sent"
        assert device.measure_probes.measured == names

    def test_killed_again_and_again_it_is_given_up(self, device, wanted) -> None:
        def die(_):
            raise Killed

        device.measure_probes.before = die
        for _ in range(3):
            with pytest.raises(Killed):
                work(device, wanted)
            device.restart()
        state = work(device, wanted)
        assert (state.phase, state.error.kind, state.error.phase) == ("failed", "StateError", "measuring")
        assert "ended 3 times" in state.error.message
        assert left(device) == []

    def test_killed_between_measuring_and_the_acknowledgement(self, device, wanted) -> None:
        def die(request, data):
            if request.method == "report":
                raise Killed
            return data

        device.fleet.intercept = die
        with pytest.raises(Killed):
            work(device, wanted)
        assert profile(device).phase == "sending"
        device.fleet.intercept = lambda _, data: data
        device.restart()
        assert work(device, wanted).phase == "sent"
        first, second = device.fleet.reports  # the server had it already; it gets the very same once more
        assert first == second
        assert device.measure_probes.starts == 1

    def test_a_damaged_report_is_made_again_from_the_record(self, device, probes, wanted) -> None:
        device.fleet.refuses_reports = ""
        device.fleet.intercept = _killing_at("report")
        with pytest.raises(Killed):
            work(device, wanted)
        (device.state / "probes" / probes.digest / "report.json").write_bytes(b"{")
        device.fleet.intercept = lambda _, data: data
        device.restart()
        assert work(device, wanted).phase == "sent"
        assert len(device.measure_probes.measured) == 3

    def test_a_defect_in_the_thread_ends_the_agent(self, device, wanted) -> None:
        def fail(_):
            raise ZeroDivisionError

        device.measure_probes.before = fail
        device.transport.want(1, probes=wanted)
        with pytest.raises(ZeroDivisionError):
            device.agent.run_until_settled(20)


def _killing_at(method: str):
    def die(request, data):
        if request.method == method:
            raise Killed
        return data

    return die


class TestRefusals:
    def failed(self, device: Device, wanted: ProbesDesired) -> tuple[str, str]:
        state = work(device, wanted)
        assert state.phase == "failed"
        assert left(device) == []
        return state.error.kind, state.error.message

    def test_a_forged_probe_set(self, device, wanted) -> None:
        forged = lambda request, data: data.replace(b"tiny", b"evil") if request.method == "target" else data  # noqa: E731
        device.fleet.intercept = forged
        kind, message = self.failed(device, wanted)
        assert kind == "TrustError"
        assert "differs from its signed digest" in message

    def test_a_forged_file(self, device, wanted) -> None:
        device.fleet.intercept = lambda request, data: data[::-1] if request.method == "chunk" else data
        assert self.failed(device, wanted)[0] == "TrustError"
        assert device.measure_probes.starts == 0

    def test_a_probe_set_that_nobody_signed(self, device) -> None:
        kind, _ = self.failed(device, ProbesDesired(probes_path("b" * 64), 1, 60.0, 1))
        assert kind == "TrustError"

    def test_signed_under_another_ones_path(self, device, probes, fleet, tmp_path) -> None:
        other = make_probes(tmp_path / "other", name="other")
        fleet._publish(probes_path("b" * 64), other.encode(), [])
        kind, _ = self.failed(device, ProbesDesired(probes_path("b" * 64), 1, 60.0, 1))
        assert kind == "BundleError"

    @pytest.mark.parametrize("target", ["lines/press-3/1.json", "probes/../../etc.json", ""])
    def test_another_kind_of_target(self, device, target) -> None:
        device.transport.want(1, probes=ProbesDesired(target, 1, 60.0, 1))
        device.agent.run_until_settled(20)
        assert (profile(device).phase, profile(device).error.kind) == ("failed", "InputError")

    def test_more_seconds_than_the_limit(self, device, wanted) -> None:
        kind, message = self.failed(device, msgspec.structs.replace(wanted, seconds=MAX_SECONDS * 2))
        assert kind == "InputError"
        assert "21600 seconds" in message
        assert device.fleet.chunk_requests() == []

    def test_a_runtime_that_is_not_here(self, device, wanted) -> None:
        device.runtimes = {"litert"}
        kind, _ = self.failed(device, wanted)
        assert kind == RuntimeUnavailableError.__name__
        assert device.fleet.chunk_requests() == []

    def test_no_room_on_the_disk(self, device, wanted, monkeypatch) -> None:
        monkeypatch.setattr("kiridashi_agent.download.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        kind, message = self.failed(device, wanted)
        assert kind == "StateError"
        assert "too little room" in message

    def test_what_the_server_does_not_accept(self, device, wanted) -> None:
        device.fleet.refuses_reports = "a number of 'x' is not positive and finite"
        kind, message = self.failed(device, wanted)
        assert kind == "RefusedError"
        assert "not positive" in message

    def test_what_cannot_be_measured(self, device, wanted) -> None:
        def fail(_):
            raise BundleError("the graph cannot be loaded")

        device.measure_probes.before = fail
        assert self.failed(device, wanted) == ("BundleError", "the graph cannot be loaded")

    def test_a_report_that_does_not_fit_into_a_message(self, device, wanted, monkeypatch) -> None:
        monkeypatch.setattr("kiridashi_agent.profile_task.MAX_CONTROL_BYTES", MAX_CONTROL_BYTES // 100)
        kind, message = self.failed(device, wanted)
        assert kind == "InputError"
        assert "one message" in message

    def test_the_lines_are_not_touched_by_it(self, serving, wanted) -> None:
        serving.fleet.refuses_reports = "no"
        before = serving.slots.active()
        serving.transport.want(2, probes=wanted, press_3=V1)
        serving.agent.tick(0)
        report = serving.agent.run_until_settled(20)
        assert (report.probes.phase, report.lines["press-3"].phase) == ("failed", "active")
        assert serving.slots.active() == before


def test_what_is_measured_when_the_time_is_up_is_handed_over(device, wanted) -> None:
    device.measure_probes.seconds_over_after = 2
    state = work(device, wanted)
    assert state.phase == "sent"
    assert device.fleet.reports[0][1].complete is False


def test_the_server_is_asked_again_until_it_answers(device, wanted) -> None:
    device.transport.offline = True
    device.task.adopt(wanted)
    cancel = threading.Event()
    thread = threading.Thread(target=device.task.run, args=(cancel,))
    thread.start()
    wait_for(lambda: (state := profile(device)) and state.error is not None)
    assert profile(device).phase == "fetching"
    device.transport.offline = False
    thread.join(20)
    assert (profile(device).phase, profile(device).error) == ("sent", None)


def test_a_server_of_1_0_does_not_know_what_to_do_with_a_report(device, wanted) -> None:
    """It was asked for by a newer server, which was then replaced by its predecessor: lines go on, the report waits."""
    answer = device.fleet.answer
    old = lambda request: ("error", b"cannot be read") if request.method == "report" else answer(request)  # noqa: E731
    device.fleet.answer = old
    device.transport.want(1, probes=wanted)
    wait_for(lambda: device.agent.tick(0) or (profile(device).phase == "sending" and profile(device).error))
    device.transport.want(2, probes=wanted, press_3=V1)
    device.agent.tick(0)
    assert (device.line.phase, profile(device).phase) == ("active", "sending")
    device.fleet.answer = answer
    assert device.agent.run_until_settled(20).probes.phase == "sent"


def test_what_is_no_longer_wanted_ends_and_is_deleted(device, wanted) -> None:
    device.measure_probes.pause_s = 30
    device.transport.want(1, probes=wanted)
    wait_for(lambda: device.agent.tick(0) or device.measure_probes.starts)
    device.transport.want(2)
    device.agent.tick(0)
    assert profile(device) is None
    assert left(device) == []


def test_another_probe_set_takes_the_place_of_the_first(device, wanted, fleet, tmp_path) -> None:
    other = make_probes(tmp_path / "other", graphs=1, name="other")
    fleet.publish_probes(tmp_path / "other", other)
    device.measure_probes.pause_s = 30
    device.transport.want(1, probes=wanted)
    wait_for(lambda: device.agent.tick(0) or device.measure_probes.starts)
    device.measure_probes.pause_s = 0
    device.transport.want(2, probes=ProbesDesired(probes_path(other.digest), 2, 60.0, 1))
    device.agent.run_until_settled(20)
    assert [(number, report.probes) for number, report in fleet.reports] == [(2, other.digest)]
    assert left(device) == []


def test_progress_is_reported_now_and_then(device, wanted, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("kiridashi_agent.profile_task._TELL_EVERY_S", 0.0)
    device.measure_probes.before = lambda _: seen.append((profile(device).done, profile(device).total))
    work(device, wanted)
    assert seen == [(0, 0), (1, 3), (2, 3)]


def test_adopting_is_a_pure_rule() -> None:
    one, two = ProbesDesired("probes/x.json", 1, 60.0, 1), ProbesDesired("probes/x.json", 2, 30.0, 4)
    first = adopted(None, one)
    assert first == ProfileRecord(ProbesState("probes/x.json", 1, "waiting"), 60.0, 1)
    assert adopted(first, one) is first
    assert adopted(first, two) == ProfileRecord(ProbesState("probes/x.json", 2, "waiting"), 30.0, 4)
    assert adopted(first, None) is None
    done = msgspec.structs.replace(first, state=msgspec.structs.replace(first.state, phase="sent"))
    assert adopted(done, None) is done
    assert adopted(None, None) is None
