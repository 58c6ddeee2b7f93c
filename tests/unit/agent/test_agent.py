"""The agent over a fleet in a dictionary and scripted child processes: what it chooses, refuses, survives."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest
from fake_device import Killed
from fake_fleet import DirectTransport
from kiridashi.budget import MIB, Budget
from kiridashi.errors import BundleError, NetworkError
from kiridashi.messages import Desired, LineDesired
from kiridashi.slots import LineSlots
from kiridashi.spool import Answer, AnswerLog, SpoolFolder
from kiridashi_agent import locks
from kiridashi_agent.cli.undo import undo
from kiridashi_agent.journal import MAX_STRANGERS
from kiridashi_agent.process import JobCancelledError, JobCrashedError
from tiny_bundle import make_bundle, write_device_samples

V1, V2 = "lines/press-3/1.json", "lines/press-3/2.json"


def phases(transport: DirectTransport) -> list[str]:
    seen = [report.lines["press-3"].phase for report in transport.states]
    return [phase for n, phase in enumerate(seen) if n == 0 or phase != seen[n - 1]]


def test_the_whole_way_to_active_reports_every_phase(device, bundles) -> None:
    device.transport.want(1, press_3=V1)
    device.jobs.p95_ms = {"model.onnx": 4.0, "model.int8.onnx": 2.0, "model.tflite": 3.0}
    state = device.settle()
    assert (state.phase, state.version, state.slot, state.error) == ("active", 1, "a", None)
    assert state.artifact == "model.int8.onnx"
    assert state.model_digest == bundles[1][1].digest
    assert state.measured.latency_p95_ms == 2.0
    assert state.verdict.within
    assert state.delivery.chunks > 0
    working = ["fetching", "downloading", "probing", "measuring", "validating", "activating"]
    assert phases(device.transport) == [*working, "active"]
    assert [name for name, _ in device.transport.events] == [*working, "active"]
    assert device.transport.states[-1].generation == 1
    assert device.slots.active().artifact == "model.int8.onnx"


def test_what_cannot_run_here_is_not_downloaded(device, bundles) -> None:
    device.runtimes = {"onnxruntime"}
    device.transport.want(1, press_3=V1)
    device.settle()
    names = {path.name for path in device.slots.folder("a").iterdir()}
    training = {"train_step.onnx", "train_state.npz"}  # samples may come later
    assert names == {"manifest.json", "model.onnx", "model.int8.onnx", "probe.npz"} | training


def test_an_update_goes_to_the_other_slot_and_fetches_only_what_is_new(serving, bundles) -> None:
    serving.transport.want(2, press_3=V2)
    state = serving.settle()
    assert (state.phase, state.slot, state.version) == ("active", "b", 2)
    assert serving.slots.previous().slot == "a"
    old = {chunk for artifact in bundles[1][1].artifacts for chunk in artifact.chunks}
    kept = {artifact.sha256 for artifact in bundles[2][1].artifacts if set(artifact.chunks) <= old}
    assert kept.isdisjoint(sha256 for sha256, _ in serving.fleet.chunk_requests())


def test_the_same_wish_again_changes_nothing(serving) -> None:
    serving.transport.want(1, press_3=V1)
    serving.transport.want(2, press_3=V1)
    serving.agent.tick(0)
    serving.agent.tick(0)
    assert serving.fleet.requests == []
    assert serving.journal.device().generation == 2
    assert serving.line.phase == "active"


def test_an_older_generation_is_ignored(serving) -> None:
    serving.transport.want(5, press_3=V2)
    serving.settle()
    serving.transport.want(4, press_3=V1)
    serving.agent.tick(0)
    assert serving.line.target == V2


def test_a_line_that_is_not_configured_is_refused_and_the_others_go_on(device) -> None:
    device.transport.want(1, press_3=V1, press_9="lines/press-9/1.json")
    report = device.agent.run_until_settled(20)
    assert report.lines["press-3"].phase == "active"
    assert report.lines["press-9"].phase == "rejected"
    assert report.lines["press-9"].error.kind == "InputError"


def test_over_the_budget_is_rejected_with_the_numbers_and_the_old_model_stays(serving, tmp_path, fleet) -> None:
    folder = tmp_path / "tight"
    fleet.publish(folder, make_bundle(folder, version=3, seed=3, budget=Budget(latency_p95_ms=1.0)))
    serving.jobs.p95_ms = {"model.onnx": 4.0, "model.int8.onnx": 1.5, "model.tflite": 3.0}
    before = serving.slots.active()
    serving.transport.want(2, press_3="lines/press-3/3.json")
    state = serving.settle()
    assert (state.phase, state.error.kind, state.error.code) == ("rejected", "BudgetError", 20)
    assert state.measured.latency_p95_ms == 1.5
    assert state.verdict.exceeded == ("latency",)
    assert "model.int8.onnx, the nearest: over the budget: p95 1.5 ms of 1 ms" in state.error.message
    assert serving.slots.active() == before
    assert (state.slot, state.model_digest) == ("a", before.model_digest)
    assert list(serving.slots.folder("b").iterdir()) == []


def test_measuring_is_limited_to_above_the_budget(device, tmp_path, fleet) -> None:
    folder = tmp_path / "limited"
    fleet.publish(folder, make_bundle(folder, version=3, budget=Budget(memory_bytes=60 * MIB)))
    device.transport.want(1, press_3="lines/press-3/3.json")
    assert device.settle().phase == "active"
    assert all(limits.memory_bytes == 188 * MIB for limits in device.jobs.limits)


def test_no_runtime_is_rejected_before_anything_is_downloaded(device) -> None:
    device.runtimes = set()
    device.transport.want(1, press_3=V1)
    state = device.settle()
    assert (state.phase, state.error.kind, state.error.code) == ("rejected", "RuntimeUnavailableError", 50)
    assert "installed here: none" in state.error.message
    assert device.fleet.chunk_requests() == []


def test_a_file_that_fails_its_probe_is_out_and_the_next_one_serves(device) -> None:
    device.jobs.fail = {"probe:model.onnx": BundleError("other outputs"), "probe:model.tflite": BundleError("x")}
    device.transport.want(1, press_3=V1)
    assert device.settle().artifact == "model.int8.onnx"
    assert [name for job, name in device.jobs.calls if job == "measure"] == ["model.int8.onnx"]


def test_when_every_probe_fails_the_bundle_is_rejected(serving) -> None:
    serving.jobs.fail = {"probe": BundleError("other outputs here")}
    serving.transport.want(2, press_3=V2)
    state = serving.settle()
    assert (state.phase, state.error.kind, state.error.phase) == ("rejected", "BundleError", "probing")
    assert serving.slots.active().slot == "a"


def test_a_file_that_is_less_accurate_is_out_and_the_report_says_why(device, bundles) -> None:
    device.jobs.p95_ms = {"model.onnx": 4.0, "model.int8.onnx": 2.0, "model.tflite": 3.0}
    device.jobs.drops = {"model.int8.onnx": 0.25}
    device.transport.want(1, press_3=V1)
    state = device.settle()
    assert state.artifact == "model.tflite"
    trials = {trial.artifact: trial for trial in state.trials}
    assert trials["model.int8.onnx"].reason == "25% of the frames lost"
    assert trials["model.int8.onnx"].accuracy.drop == 0.25
    assert trials["model.int8.onnx"].latency_p95_ms is None
    assert (trials["model.tflite"].chosen, trials["model.tflite"].provider) == (True, "cpu")
    assert trials["model.onnx"].reason == "inside the budget, and slower than model.tflite"
    # A float file is the reference: it needs no comparison.
    assert [name for job, name in device.jobs.calls if job == "accuracy"] == ["model.int8.onnx"]


def test_the_line_says_how_much_may_be_lost(device) -> None:
    device.set_line(max_accuracy_drop=0.3)
    device.jobs.p95_ms = {"model.onnx": 4.0, "model.int8.onnx": 2.0, "model.tflite": 3.0}
    device.jobs.drops = {"model.int8.onnx": 0.25}
    device.transport.want(1, press_3=V1)
    assert device.settle().artifact == "model.int8.onnx"


def test_when_no_file_is_accurate_enough_the_bundle_is_rejected(serving) -> None:
    serving.set_line(max_accuracy_drop=0.1, runtime="onnxruntime")
    serving.jobs.fail = {"probe:model.onnx": BundleError("other outputs")}
    serving.jobs.drops = {"model.int8.onnx": 0.25}
    serving.transport.want(2, press_3=V2)
    state = serving.settle()
    assert (state.phase, state.error.kind, state.error.message) == ("rejected", "BundleError", "other outputs")
    assert [trial.reason for trial in state.trials] == ["failed its checks: other outputs", "25% of the frames lost"]
    assert serving.slots.active().slot == "a"


def test_a_file_whose_accuracy_cannot_be_checked_is_out(device) -> None:
    device.jobs.p95_ms = {"model.onnx": 4.0, "model.int8.onnx": 2.0, "model.tflite": 3.0}
    device.jobs.fail = {"accuracy": JobCrashedError("the child died")}
    device.transport.want(1, press_3=V1)
    state = device.settle()
    assert state.artifact == "model.tflite"
    assert "failed its checks: the child died" in [trial.reason for trial in state.trials]


def test_providers_and_threads_of_the_line_reach_measuring_and_the_line_process(device) -> None:
    device.set_line(providers=("cuda", "cpu"), threads=3)
    device.transport.want(1, press_3=V1)
    state = device.settle()
    assert {(request.providers, request.threads) for request in device.jobs.requests} == {(("cuda", "cpu"), 3)}
    active = device.slots.active()
    assert (active.providers, active.threads) == (("cuda", "cpu"), 3)
    assert state.measured.provider == "cpu"


def test_when_nothing_can_be_measured_the_reason_is_reported(serving) -> None:
    serving.jobs.fail = {"measure": JobCrashedError("the child died")}
    serving.transport.want(2, press_3=V2)
    state = serving.settle()
    assert (state.phase, state.error.code, state.measured) == ("rejected", 51, None)


class TestTuning:
    @pytest.fixture
    def tuning(self, device, tmp_path):
        write_device_samples(tmp_path / "samples")
        device.config = msgspec.structs.replace(
            device.config,
            lines={"press-3": msgspec.structs.replace(device.config.lines["press-3"], samples=tmp_path / "samples")},
        )
        device.restart()
        device.transport.want(1, press_3=V1)
        return device

    def test_files_that_can_be_tuned_go_first(self, tuning) -> None:
        tuning.jobs.p95_ms = {"model.int8.onnx": 0.1}
        state = tuning.settle()
        assert ("tune", "model.onnx") in tuning.jobs.calls
        assert state.tune.reason == "worse"
        measured = [artifact for job, artifact in tuning.jobs.calls if job in ("measure", "tune")]
        assert measured.index("model.int8.onnx") > measured.index("model.onnx", 1)
        assert (tuning.slots.folder("a") / "train_step.onnx").is_file()

    @pytest.mark.parametrize("failing", [False, True])
    def test_if_the_tuning_wins_nothing_the_fastest_of_all_goes_on(self, tuning, failing) -> None:
        tuning.jobs.p95_ms = {"model.int8.onnx": 0.1, "model.onnx": 2.0, "model.tflite": 3.0}
        tuning.jobs.fail = {"tune": JobCrashedError("out of memory")} if failing else {}
        state = tuning.settle()
        assert (state.phase, state.artifact, state.tuned) == ("active", "model.int8.onnx", False)
        assert (tuning.slots.active().artifact, state.measured.latency_p95_ms) == ("model.int8.onnx", 0.1)
        assert state.tuning.startswith("model.int8.onnx is untuned: ")
        chosen = {trial.artifact: (trial.chosen, trial.reason) for trial in state.trials}
        assert chosen["model.int8.onnx"] == (True, "the fastest that passed every gate")
        assert chosen["model.onnx"] == (False, "inside the budget, and slower than model.int8.onnx")

    def test_a_postponed_file_that_cannot_be_measured_or_is_slow_changes_nothing(self, tuning) -> None:
        tuning.jobs.fail = {"measure:model.int8.onnx": JobCrashedError("crashed")}
        state = tuning.settle()
        assert (state.phase, state.artifact) == ("active", "model.onnx")
        reasons = {trial.artifact: trial.reason for trial in state.trials}
        assert "could not be measured: crashed" in reasons["model.int8.onnx"]

    def test_when_none_of_them_fits_an_untuned_one_goes_on(self, tuning, fleet, tmp_path) -> None:
        folder = tmp_path / "tight"
        fleet.publish(folder, make_bundle(folder, version=3, budget=Budget(latency_p95_ms=1.0)))
        tuning.jobs.p95_ms = {"model.int8.onnx": 0.1}
        tuning.transport.want(2, press_3="lines/press-3/3.json")
        tuning.agent.tick(0)
        state = tuning.settle()
        assert (state.artifact, state.tune) == ("model.int8.onnx", None)

    def test_a_failing_tuning_does_not_stop_the_model(self, tuning) -> None:
        tuning.jobs.fail = {"tune": JobCrashedError("out of memory")}
        state = tuning.settle()
        assert (state.phase, state.tuned) == ("active", False)
        assert (state.error.phase, state.error.message) == ("tuning", "out of memory")

    def test_tuned_files_without_a_valid_seal_are_not_activated(self, tuning) -> None:
        tuning.jobs.kept = True
        tuning.jobs.tune = lambda request, limits, original=tuning.jobs.tune: msgspec.structs.replace(
            original(request, limits), model_digest="sha256:" + "0" * 64
        )
        state = tuning.settle()
        assert (state.phase, state.error.kind) == ("rejected", "TrustError")
        assert tuning.slots.active() is None

    def test_switched_off_means_off(self, tuning) -> None:
        line = msgspec.structs.replace(tuning.config.lines["press-3"], tune=False)
        tuning.config = msgspec.structs.replace(tuning.config, lines={"press-3": line})
        tuning.restart()
        assert tuning.settle().phase == "active"
        assert all(job != "tune" for job, _ in tuning.jobs.calls)

    def test_named_frames_are_enough_to_tune(self, device) -> None:
        log = AnswerLog(SpoolFolder(device.state, "press-3").answers_path)
        log.add(Answer("1", "x.frame", "class", 1.0, "dent"))
        device.transport.want(1, press_3=V1)
        assert device.settle().tune.reason == "worse"
        assert [job for job, _ in device.jobs.calls].count("tune") == 1


class TestRefused:
    def attack(self, serving, intercept) -> object:
        serving.fleet.intercept = intercept
        before = serving.slots.active()
        serving.transport.want(2, press_3=V2)
        state = serving.settle()
        assert state.phase == "rejected"
        assert serving.slots.active() == before
        assert (state.slot, state.artifact, state.model_digest) == (before.slot, before.artifact, before.model_digest)
        return state.error

    def test_a_changed_chunk(self, serving) -> None:
        error = self.attack(serving, lambda request, data: data[::-1] if request.method == "chunk" else data)
        assert (error.kind, error.code, error.phase) == ("TrustError", 31, "downloading")
        assert list(serving.slots.folder("b").iterdir()) == []

    def test_a_changed_manifest(self, serving) -> None:
        error = self.attack(serving, lambda request, data: data + b" " if request.method == "target" else data)
        assert (error.kind, error.phase) == ("TrustError", "fetching")

    def test_rolled_back_metadata(self, serving) -> None:
        old = serving.fleet.metadata["timestamp.json"]
        serving.fleet.commit()
        serving.transport.want(2, press_3=V2)
        serving.settle()
        serving.fleet.intercept = lambda request, data: old if request.name == "timestamp.json" else data
        serving.transport.want(3, press_3=V1)
        state = serving.settle()
        assert (state.phase, state.error.kind) == ("rejected", "TrustError")
        assert "rollback" in state.error.message
        assert serving.slots.active().slot == "b"


def test_a_refusal_from_outside_is_tried_again_with_the_next_generation(serving) -> None:
    serving.fleet.intercept = lambda request, data: data + b" " if request.method == "target" else data
    serving.transport.want(2, press_3=V2)
    assert serving.settle().phase == "rejected"
    serving.fleet.intercept = lambda _request, data: data
    serving.transport.want(2, press_3=V2)
    assert serving.agent.tick(0) is None
    assert serving.line.phase == "rejected"
    serving.transport.want(3, press_3=V2)
    assert serving.agent.tick(0) is None
    assert serving.settle().phase == "active"


def test_a_model_that_was_refused_for_itself_needs_another_rollout(serving) -> None:
    serving.jobs.fail = {"probe": BundleError("other outputs")}
    serving.transport.want(2, press_3=V2)
    serving.settle()
    serving.jobs.fail = {}
    serving.transport.want(3, press_3=V2)
    serving.agent.tick(0)
    assert serving.line.phase == "rejected"
    serving.transport._desired.append(Desired(4, {"press-3": LineDesired(V2, rollout="again")}))
    serving.agent.tick(0)
    assert serving.line.phase == "active"


def test_once_gives_a_server_that_is_about_to_speak_a_moment(serving) -> None:
    serving.restart()
    serving.transport.want(1, press_3=V1)
    serving.transport.want(1, press_3=V1)  # a server that starts says it again
    serving.transport.want(2, press_3=V2)
    assert serving.agent.run_until_settled(20, quiet_s=1.0).lines["press-3"].target == V2


def test_once_gives_the_moment_on_a_new_device_too_that_was_wanted_nothing_of_yet(device) -> None:
    device.transport.want(1)
    device.transport.want(2, press_3=V1)
    assert device.agent.run_until_settled(20, quiet_s=1.0).lines["press-3"].target == V1


class TestOffline:
    def test_it_waits_reports_why_and_goes_on(self, serving) -> None:
        serving.transport.want(2, press_3=V2)
        serving.transport.offline = True
        serving.agent.tick(0)
        assert (serving.line.phase, serving.line.error.kind) == ("fetching", "NetworkError")
        serving.transport.offline = False
        state = serving.settle()
        assert (state.phase, state.error) == ("active", None)

    def test_once_gives_up_in_time_and_says_where_it_stands(self, serving) -> None:
        serving.transport.want(2, press_3=V2)
        serving.transport.offline = True
        serving.agent.tick(0)
        with pytest.raises(NetworkError, match="press-3 is fetching: the broker is not there"):
            serving.agent.run_until_settled(timeout_s=0.1)

    def test_without_a_wish_once_says_so(self, device) -> None:
        with pytest.raises(NetworkError, match="no desired state for device 'cam-1'"):
            device.agent.run_until_settled(timeout_s=0.1)

    def test_a_newer_wish_replaces_one_that_waits(self, device) -> None:
        device.transport.want(1, press_3=V1)
        device.transport.offline = True
        device.agent.tick(0)
        device.transport.offline = False
        device.transport.want(2, press_3=V2)
        assert device.settle().target == V2


class TestCrash:
    @pytest.mark.parametrize("job", ["probe", "measure"])
    def test_a_kill_in_a_job_is_gone_over_again(self, device, job) -> None:
        def die(running: str) -> None:
            if running == job:
                raise Killed

        device.transport.want(1, press_3=V1)
        device.jobs.before = die
        with pytest.raises(Killed):
            device.settle()
        fetched = len(device.fleet.chunk_requests())
        device.jobs.before = None
        device.restart()
        device.transport.want(1, press_3=V1)
        assert device.settle().phase == "active"
        assert len(device.fleet.chunk_requests()) == fetched

    @pytest.mark.parametrize("writes", range(1, 9))
    def test_a_kill_at_any_journal_write_ends_in_the_same_place(self, serving, writes, monkeypatch) -> None:
        left = [writes]
        original = serving.journal.write_line

        def write(line, record):
            original(line, record)
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        serving.transport.want(2, press_3=V2)
        monkeypatch.setattr(serving.journal, "write_line", write)
        with pytest.raises(Killed):
            serving.settle()
        serving.restart()
        serving.transport.want(2, press_3=V2)
        state = serving.settle()
        assert (state.phase, state.version, state.slot) == ("active", 2, "b")
        assert serving.journal.device().generation == 2
        assert serving.slots.previous().slot == "a"

    def test_a_kill_between_the_pointer_and_the_journal(self, serving, monkeypatch) -> None:
        original = LineSlots.activate

        def activate(self, active):
            original(self, active)
            raise Killed

        serving.transport.want(2, press_3=V2)
        with monkeypatch.context() as patch:
            patch.setattr(LineSlots, "activate", activate)
            with pytest.raises(Killed):
                serving.settle()
        assert serving.slots.active().slot == "b"
        serving.restart()
        serving.transport.want(2, press_3=V2)
        assert (serving.settle().phase, serving.line.slot) == ("active", "b")
        assert serving.slots.previous().slot == "a"

    def test_a_phase_that_takes_the_agent_down_is_given_up(self, serving) -> None:
        def die(_running: str) -> None:
            raise Killed

        serving.transport.want(2, press_3=V2)
        serving.jobs.before = die
        for _ in range(3):
            with pytest.raises(Killed):
                serving.settle()
            serving.restart()
            serving.transport.want(2, press_3=V2)
        state = serving.settle()
        assert (state.phase, state.error.kind, state.error.phase) == ("rejected", "StateError", "probing")
        assert "ended 3 times" in state.error.message
        assert serving.slots.active().slot == "a"

    def test_ending_on_purpose_is_not_counted_against_the_phase(self, device) -> None:
        device.transport.want(1, press_3=V1)
        device.jobs.fail = {"probe": JobCancelledError("stopped")}
        device.agent.tick(0)
        assert (device.line.phase, device.journal.line("press-3").attempts) == ("probing", 0)

    @pytest.mark.parametrize("name", ["unlink", "sweep", "sync_folder"])
    def test_a_disk_that_fails_once_the_pointer_was_moved_ends_in_the_same_place(
        self, serving, monkeypatch, name
    ) -> None:
        """The new model serves then, so the report says so, and the next start finds nothing amiss."""
        original = LineSlots._write

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def write(slots, pointer) -> None:
            original(slots, pointer)
            if name == "sync_folder":  # the last that write_atomic does
                fail()
            owner = {"unlink": Path, "sweep": LineSlots}[name]
            monkeypatch.setattr(owner, name, fail)

        serving.transport.want(2, press_3=V2)
        with monkeypatch.context() as patch:
            patch.setattr(LineSlots, "_write", write)
            state = serving.settle()
        assert (state.phase, state.version, state.slot) == ("active", 2, "b")
        assert serving.slots.active().slot == "b"
        monkeypatch.undo()
        serving.restart()
        serving.transport.want(2, press_3=V2)
        assert serving.settle() == state

    def test_a_disk_that_fails_before_the_pointer_is_moved_leaves_the_old_model(self, serving, monkeypatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        before = serving.slots.active()
        serving.transport.want(2, press_3=V2)
        with monkeypatch.context() as patch:
            patch.setattr(LineSlots, "activate", fail)
            state = serving.settle()
        assert (state.phase, state.slot, serving.slots.active()) == ("rejected", "a", before)

    def test_a_damaged_journal_starts_over_while_the_active_slot_serves(self, serving) -> None:
        (serving.state / "journal" / "press-3.line.json").write_bytes(b"\x00\x00")
        before = serving.slots.active()
        serving.restart()
        assert serving.line.phase == "idle"
        assert serving.slots.active() == before
        serving.transport.want(1, press_3=V1)
        assert serving.settle().phase == "active"
        assert serving.fleet.chunk_requests() == []


class TestAJournalThatCannotBeRead:
    """One line's: the others go on, and the report says what is wrong with that one."""

    @pytest.fixture
    def unread(self, serving, monkeypatch):
        other = {"press-4": msgspec.structs.replace(serving.config.lines["press-3"], tune=False)}
        serving.config = msgspec.structs.replace(serving.config, lines=serving.config.lines | other)
        serving.restart()
        read = Path.read_bytes

        def refuse(path: Path) -> bytes:
            if path.name.startswith("press-4.line"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return read(path)

        (serving.state / "journal" / "press-4.line.json").write_bytes(b"{}")
        monkeypatch.setattr(Path, "read_bytes", refuse)
        return serving

    def test_the_others_go_on_and_the_report_says_so(self, unread) -> None:
        unread.transport.want(2, press_3=V2, press_4=V1)
        for _ in range(3):
            unread.agent.tick(0)
        lines = unread.transport.states[-1].lines
        assert (lines["press-3"].phase, lines["press-3"].version, lines["press-3"].error) == ("active", 2, None)
        assert "Permission denied" in lines["press-4"].error.message
        assert "chown" in lines["press-4"].error.message
        assert unread.journal.device().generation == 1  # the wish was not taken whole

    def test_other_work_is_not_held_up(self, unread) -> None:
        unread.config = msgspec.structs.replace(
            unread.config, limits=msgspec.structs.replace(unread.config.limits, retry_wait_s=60.0)
        )
        unread.restart()
        begun = []

        class Idle:
            def go_on(self) -> None:
                begun.append(True)

            def is_open(self) -> bool:
                return False

            def pause(self) -> None:
                pass

        unread.agent._idle = (Idle(),)
        unread.transport.want(2, press_4=V1)
        for _ in range(2):
            unread.agent.tick(0)
        assert begun

    def test_once_says_which_line_it_is(self, unread) -> None:
        unread.transport.want(2, press_4=V1)
        with pytest.raises(Exception, match="line 'press-4' could not be taken"):
            unread.agent.run_until_settled(0.2)

    def test_once_it_can_be_read_the_wish_is_taken(self, unread, monkeypatch) -> None:
        unread.transport.want(2, press_3=V2, press_4="lines/press-4/1.json")
        unread.agent.tick(0)
        monkeypatch.undo()
        (unread.state / "journal" / "press-4.line.json").unlink()
        unread.agent.run_until_settled(20)
        assert unread.journal.device().generation == 2


def test_lines_that_nobody_configured_leave_a_bounded_trace(serving) -> None:
    strangers = {f"stranger_{number:02}": V1 for number in range(40)}
    serving.transport.want(2, press_3=V1, **strangers)
    serving.settle()
    assert len(serving.journal.lines()) == 1 + MAX_STRANGERS
    serving.transport.want(3, press_3=V1, **{f"other_{number:02}": V1 for number in range(40)})
    serving.settle()
    names = set(serving.journal.lines())
    assert (len(names), "press-3" in names, serving.journal.device().generation) == (1 + MAX_STRANGERS, True, 3)
    assert {name.partition("-")[0] for name in names} == {"press", "other"}
    assert serving.slots.active().slot == "a"


class TestUndo:
    def test_to_the_previous_model(self, serving) -> None:
        serving.transport.want(2, press_3=V2)
        serving.settle()
        assert undo(serving.state, "press-3", None).slot == "a"
        serving.agent.tick(0)
        report = serving.transport.states[-1].lines["press-3"]
        assert (report.phase, report.slot, report.target) == ("rolled-back", "a", V2)

    def test_the_undone_target_is_not_taken_again_by_itself(self, serving) -> None:
        serving.transport.want(2, press_3=V2)
        serving.settle()
        undo(serving.state, "press-3", None)
        serving.transport.want(3, press_3=V2)
        serving.agent.tick(0)
        assert serving.line.phase == "rolled-back"

    def test_with_nothing_to_go_back_to(self, serving) -> None:
        with pytest.raises(Exception, match="no previous model"):
            undo(serving.state, "press-3", None)
        with pytest.raises(Exception, match="is not tuned"):
            undo(serving.state, "press-3", "untuned")

    def test_not_in_the_middle_of_an_update(self, serving, monkeypatch) -> None:
        serving.transport.want(2, press_3=V2)
        serving.transport.offline = True
        serving.agent.tick(0)
        with pytest.raises(Exception, match="cannot happen while a line is 'fetching'"):
            undo(serving.state, "press-3", None)
        monkeypatch.setattr(locks, "FIRST_S", 0.1)
        with serving.journal.lock("press-3", wait=True), pytest.raises(Exception, match="in use"):
            undo(serving.state, "press-3", None)
