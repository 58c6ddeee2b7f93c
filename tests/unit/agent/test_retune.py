"""Tuning what serves: the phases, kills between them, and what stands in the way. Child processes are stand-ins."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_device import FakeJobs, Killed
from kiridashi.artifacts import MANIFEST_NAME, sha256_file
from kiridashi.budget import MIB, Budget
from kiridashi.errors import BudgetError, BundleError, StateError
from kiridashi.kept import KeptFrame, KeptSamples, frame_key
from kiridashi.manifest import decode_manifest
from kiridashi.samples import write_samples
from kiridashi.slots import TUNED_NAME, LineSlots
from kiridashi.spool import Answer, AnswerLog, SpoolFolder
from kiridashi.trust import SEAL_NAME, Seal, load_or_create_key, sign_seal
from kiridashi_agent import retune as module
from kiridashi_agent.cli.undo import undo
from kiridashi_agent.jobs import TuneOutcome
from kiridashi_agent.process import JobCancelledError, JobCrashedError
from kiridashi_agent.retune import LineTuner, TuneWish
from kiridashi_agent.tune_terms import LEAST_BYTES, tune_limits, tune_request
from kiridashi_agent.tune_worker import TuneWorker, newly_named
from tiny_bundle import device_tiles, make_bundle

LINE = "press-3"
V2 = "lines/press-3/2.json"


@dataclass
class SealingJobs(FakeJobs):
    """Tunes by copying the file, and seals it as the child does."""

    kept: bool = True
    artifact: str = ""
    requests: list = field(default_factory=list)

    def tune(self, request, limits):
        self.requests.append((request, limits))
        outcome = super().tune(request, limits)
        if not self.kept:
            return outcome
        state, name = Path(request.state_dir), self.artifact or request.artifact
        folder = LineSlots(state, request.line).folder(request.slot)
        tuned = folder / TUNED_NAME
        tuned.mkdir()
        shutil.copy(folder / name, tuned / name)
        parent = decode_manifest((folder / MANIFEST_NAME).read_bytes()).digest
        number = len(self.requests)  # so that every tuning has a digest of its own
        seal = Seal(
            line=LINE,
            device="cam-1",
            parent=parent,
            artifacts={name: sha256_file(tuned / name)},
            values="",
            accuracy_before=0.5,
            accuracy_after=0.9,
            holdout=number,
        )
        signed = sign_seal(seal, load_or_create_key(state))
        (tuned / SEAL_NAME).write_bytes(signed.encode())
        return TuneOutcome(outcome.report, name, signed.digest)


@pytest.fixture
def ready(serving, tmp_path):
    """Version 1 serves from slot a, and there is a file of samples."""
    images, labels = device_tiles(8, seed=5)
    write_samples(tmp_path / "given.npz", images, labels)
    serving.jobs = SealingJobs()
    serving.given = TuneWish("asked", (tmp_path / "given.npz",))
    serving.restart()
    return serving


@pytest.fixture
def quantised(ready, fleet, tmp_path):
    """Version 3 serves as int8: its float32 files were too slow."""
    fleet.publish(tmp_path / "three", make_bundle(tmp_path / "three", version=3, budget=Budget(latency_p95_ms=6.0)))
    ready.jobs.p95_ms = {"model.onnx": 9.0, "model.tflite": 9.0, "model.int8.onnx": 1.0}
    ready.transport.want(2, press_3="lines/press-3/3.json")
    assert ready.settle().artifact == "model.int8.onnx"
    return ready


def tuner(device) -> LineTuner:
    return LineTuner(device.config, device.journal, device.trust, device.jobs, lambda: device.runtimes)


def named(device, count: int, start: int = 0) -> None:
    log = AnswerLog(SpoolFolder(device.state, LINE).answers_path)
    for number in range(start, start + count):
        log.add(Answer(f"a{number}", f"u-{number}", "class", 1.0, "dent"))


def configure(device, **line) -> None:
    section = msgspec.structs.replace(device.config.lines[LINE], **line)
    device.config = msgspec.structs.replace(device.config, lines={LINE: section})


def bench_is_clear(device) -> bool:
    return not device.slots.folder("bench").exists()


class TestKept:
    def test_it_serves_from_the_other_slot_and_the_line_keeps_its_phase(self, ready) -> None:
        before = ready.slots.active()
        record = tuner(ready).tune(LINE, ready.given)
        active = ready.slots.active()
        assert (record.phase, record.error, active.slot, active.tuned) == ("done", None, "b", True)
        assert ready.slots.previous() == before
        state = ready.journal.line(LINE).state
        assert (state.phase, state.target, state.slot, state.tuned) == ("active", "lines/press-3/1.json", "b", True)
        assert state.model_digest == active.model_digest == record.digest
        assert state.tuning.startswith("tuned on 24 samples and judged by 8")
        assert state.tune.kept
        assert bench_is_clear(ready)

    def test_the_second_tuning_has_to_beat_the_first(self, ready) -> None:
        tuner(ready).tune(LINE, ready.given)
        first = ready.slots.active()
        tuner(ready).tune(LINE, ready.given)
        (one, _), (two, _) = ready.jobs.requests
        assert (one.serving, two.serving) == ("", str(ready.slots.folder("b") / TUNED_NAME))
        assert {one.slot, two.slot} == {"bench"}
        assert (ready.slots.active().slot, ready.slots.previous()) == ("a", first)

    def test_undo_goes_back_one_tuning_and_untuned_to_the_shipped_weights(self, ready) -> None:
        shipped = ready.slots.active()
        for _ in range(3):
            tuner(ready).tune(LINE, ready.given)
        third, second = ready.slots.active(), ready.slots.previous()
        assert undo(ready.state, LINE, "previous") == second
        assert ready.journal.line(LINE).state.model_digest == second.model_digest
        with pytest.raises(StateError, match="no previous"):
            undo(ready.state, LINE, "previous")
        back = undo(ready.state, LINE, "untuned")
        assert (back.model_digest, back.tuned) == (shipped.model_digest, False)
        assert undo(ready.state, LINE, "previous") == second
        assert third.model_digest != second.model_digest
        assert tuner(ready).tune(LINE, ready.given).phase == "done"  # and on from there

    def test_what_was_undone_stays_so_for_the_server_when_it_is_tuned(self, ready) -> None:
        ready.transport.want(2, press_3=V2)
        ready.settle()
        undo(ready.state, LINE, "previous")
        tuner(ready).tune(LINE, ready.given)
        state = ready.journal.line(LINE).state
        assert (state.phase, state.target, state.tuned) == ("rolled-back", V2, True)

    @pytest.mark.parametrize(("p95_ms", "inside"), [(4.0, True), (9.0, False)])
    def test_a_quantised_model_gives_way_to_its_float_sibling_only_inside_the_budget(
        self, quantised, p95_ms: float, inside: bool
    ) -> None:
        before = quantised.slots.active()
        quantised.jobs.artifact = "model.onnx"
        quantised.jobs.p95_ms["model.onnx"] = p95_ms
        if inside:
            tuner(quantised).tune(LINE, quantised.given)
            assert quantised.slots.active().artifact == "model.onnx"
            assert quantised.slots.previous() == before
            assert quantised.journal.line(LINE).state.measured.latency_p95_ms == p95_ms
            return
        with pytest.raises(BudgetError, match=r"model\.onnx would be over the budget"):
            tuner(quantised).tune(LINE, quantised.given)
        assert quantised.slots.active() == before
        assert "model.onnx would be over the budget" in quantised.journal.line(LINE).state.tuning

    def test_the_line_s_settings_of_now_are_measured_and_handed_to_the_line(self, ready) -> None:
        section = ready.config.lines[LINE]
        assert ready.slots.active().providers == section.providers
        configure(ready, providers=("xnnpack", "cpu"), threads=2)
        tuner(ready).tune(LINE, ready.given)
        active = ready.slots.active()
        assert (active.tuned, active.providers, active.threads) == (True, ("xnnpack", "cpu"), 2)
        assert ready.jobs.calls[-1] == ("measure", active.artifact)
        assert ready.journal.line(LINE).state.measured.provider == "cpu"
        tuner(ready).tune(LINE, ready.given)
        assert ready.jobs.calls[-1] == ("tune", active.artifact)  # nothing is new, and nothing measured again

    def test_settings_of_now_that_break_the_budget_leave_the_old_model(self, ready, fleet, tmp_path) -> None:
        folder = tmp_path / "three"
        fleet.publish(folder, make_bundle(folder, version=3, budget=Budget(latency_p95_ms=6.0)))
        ready.transport.want(2, press_3="lines/press-3/3.json")
        before = ready.settle() and ready.slots.active()
        configure(ready, threads=2)
        ready.jobs.p95_ms = {before.artifact: 9.0}
        with pytest.raises(BudgetError, match="goes on as it is"):
            tuner(ready).tune(LINE, ready.given)
        assert ready.slots.active() == before


class TestNotKept:
    def test_a_worse_model_changes_nothing_and_the_report_says_why(self, ready) -> None:
        before = ready.slots.active(), ready.slots.previous()
        ready.jobs.kept = False
        record = tuner(ready).tune(LINE, ready.given)
        assert (record.phase, record.report.reason) == ("done", "worse")
        assert (ready.slots.active(), ready.slots.previous()) == before
        assert "the model that served goes on: worse" in ready.journal.line(LINE).state.tuning
        assert bench_is_clear(ready)

    def test_the_way_back_is_given_up_only_for_a_model_that_is_kept(self, ready) -> None:
        ready.transport.want(2, press_3=V2)
        ready.settle()
        way_back = ready.slots.previous()
        ready.jobs.kept = False
        tuner(ready).tune(LINE, ready.given)
        assert ready.slots.previous() == way_back
        assert undo(ready.state, LINE, "previous") == way_back

    def test_a_child_that_crashes_is_said(self, ready) -> None:
        before = ready.slots.active()
        ready.jobs.fail = {"tune": JobCrashedError("out of memory")}
        with pytest.raises(JobCrashedError):
            tuner(ready).tune(LINE, ready.given)
        record = ready.journal.tuning(LINE)
        assert (record.phase, record.error.kind, record.error.phase) == ("failed", "JobCrashedError", "tuning")
        assert ready.slots.active() == before
        assert "out of memory; the model that served goes on" in ready.journal.line(LINE).state.tuning
        assert bench_is_clear(ready)

    def test_a_seal_that_is_not_this_device_s_is_not_activated(self, ready) -> None:
        original = ready.jobs.tune

        def forged(request, limits):
            outcome = original(request, limits)
            path = ready.slots.folder("bench") / TUNED_NAME / outcome.artifact
            path.write_bytes(path.read_bytes() + b"!")
            return outcome

        ready.jobs.tune = forged
        with pytest.raises(Exception, match="not the file that was sealed"):
            tuner(ready).tune(LINE, ready.given)
        assert not ready.slots.active().tuned


class TestRefused:
    def refuse(self, device, match: str, wish: TuneWish | None = None, kind: type[Exception] = StateError) -> None:
        before = device.slots.active(), device.journal.line(LINE)
        with pytest.raises(kind, match=match):
            tuner(device).tune(LINE, wish or device.given)
        assert (device.slots.active(), device.journal.line(LINE)) == before
        assert device.journal.tuning(LINE) is None
        assert not [call for call in device.jobs.calls if call[0] == "tune"]

    def test_while_an_update_is_under_way(self, ready) -> None:
        record = ready.journal.line(LINE)
        state = msgspec.structs.replace(record.state, phase="downloading")
        ready.journal.write_line(LINE, msgspec.structs.replace(record, state=state))
        self.refuse(ready, "an update is under way")

    def test_while_somebody_else_works_on_the_line(self, ready) -> None:
        with ready.journal.lock(LINE, wait=True):
            self.refuse(ready, "in use by another process")

    def test_an_update_waits_for_a_tuning(self, ready) -> None:
        """The agent takes the line's lock for every step of an update; a tuning holds it to its end."""
        free = []

        def look(job: str) -> None:
            if job == "tune":
                try:
                    with ready.journal.lock(LINE, wait=False):
                        free.append(True)
                except StateError:
                    free.append(False)

        ready.jobs.before = look
        tuner(ready).tune(LINE, ready.given)
        assert free == [False]

    def test_without_samples_or_with_tuning_off(self, ready) -> None:
        self.refuse(ready, "cannot be tuned", TuneWish())
        configure(ready, tune=False)
        self.refuse(ready, "cannot be tuned")

    def test_when_the_train_step_was_not_fetched(self, ready) -> None:
        (ready.slots.folder("a") / "train_step.onnx").unlink()
        self.refuse(ready, "cannot be tuned", kind=BundleError)

    def test_when_the_board_is_hot(self, ready, monkeypatch) -> None:
        monkeypatch.setattr(module, "hottest_celsius", lambda: 88.0)
        self.refuse(ready, "too hot")
        monkeypatch.setattr(module, "hottest_celsius", lambda: None)
        assert tuner(ready).tune(LINE, ready.given).phase == "done"


class TestKilled:
    """The process ends at a point; the next one settles it."""

    def killed_in(self, device, monkeypatch, owner: object, name: str) -> None:
        def end(*_: object, **__: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, end)
            with pytest.raises(Killed):
                tuner(device).tune(LINE, device.given)
        device.restart()

    @pytest.mark.parametrize("point", ["lay_on_bench", "tune", "check_seal"])
    def test_on_the_bench_the_old_model_serves_and_the_next_start_says_so(self, ready, monkeypatch, point) -> None:
        owner = {"lay_on_bench": LineSlots, "tune": ready.jobs, "check_seal": type(ready.trust)}[point]
        before = ready.slots.active(), ready.slots.previous()
        self.killed_in(ready, monkeypatch, owner, point)
        assert (ready.slots.active(), ready.slots.previous()) == before
        tuner(ready).settle(LINE)
        record = ready.journal.tuning(LINE)
        assert (record.phase, record.error.kind) == ("interrupted", "StateError")
        assert "interrupted" in ready.journal.line(LINE).state.tuning
        assert (ready.slots.active(), ready.slots.previous()) == before
        assert bench_is_clear(ready)
        assert tuner(ready).tune(LINE, ready.given).phase == "done"

    @pytest.mark.parametrize("point", ["take_bench", "prepare", "activate"])
    def test_while_activating_the_next_start_finishes_it(self, ready, monkeypatch, point) -> None:
        before = ready.slots.active()
        self.killed_in(ready, monkeypatch, LineSlots, point)
        assert ready.slots.active() == before
        tuner(ready).settle(LINE)
        record, active = ready.journal.tuning(LINE), ready.slots.active()
        assert (record.phase, active.slot, active.model_digest) == ("done", "b", record.digest)
        assert ready.journal.line(LINE).state.model_digest == record.digest
        assert bench_is_clear(ready)
        assert undo(ready.state, LINE, "previous") == before

    def test_after_the_pointer_was_replaced_the_journal_follows(self, ready, monkeypatch) -> None:
        self.killed_in(ready, monkeypatch, module, "with_active")
        active = ready.slots.active()
        assert active.tuned
        tuner(ready).settle(LINE)
        assert ready.journal.line(LINE).state.model_digest == active.model_digest
        assert ready.journal.tuning(LINE).phase == "done"

    def test_a_disk_that_fills_up_after_the_pointer_was_replaced_loses_nothing(self, ready, monkeypatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module, "with_active", full)
            with pytest.raises(StateError, match="could not be read or written"):
                tuner(ready).tune(LINE, ready.given)
        assert ready.journal.tuning(LINE).phase == "activating"
        tuner(ready).settle(LINE)
        assert ready.journal.tuning(LINE).phase == "done"
        assert ready.journal.line(LINE).state.model_digest == ready.slots.active().model_digest

    def test_a_disk_that_is_full_from_the_start_leaves_the_old_model(self, ready, monkeypatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        before = ready.slots.active()
        with monkeypatch.context() as patch:
            patch.setattr(LineSlots, "lay_on_bench", full)
            with pytest.raises(StateError, match="could not be read or written"):
                tuner(ready).tune(LINE, ready.given)
        assert ready.journal.tuning(LINE).phase == "failed"
        assert ready.slots.active() == before

    def test_ctrl_c_is_noted(self, ready) -> None:
        ready.jobs.fail = {"tune": KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            tuner(ready).tune(LINE, ready.given)
        assert ready.journal.tuning(LINE).phase == "interrupted"
        assert bench_is_clear(ready)

    def test_what_somebody_undid_meanwhile_is_not_activated_again(self, ready, monkeypatch) -> None:
        ready.transport.want(2, press_3=V2)
        ready.settle()
        self.killed_in(ready, monkeypatch, LineSlots, "take_bench")
        back = undo(ready.state, LINE, "previous")
        tuner(ready).settle(LINE)
        assert ready.slots.active() == back
        assert ready.journal.tuning(LINE).phase == "failed"
        assert bench_is_clear(ready)

    def test_nor_after_the_pointer_was_replaced(self, ready, monkeypatch) -> None:
        before = ready.slots.active()
        self.killed_in(ready, monkeypatch, module, "with_active")
        assert ready.slots.active().tuned
        assert undo(ready.state, LINE, "previous") == before
        tuner(ready).settle(LINE)
        assert ready.slots.active() == before
        assert "undone" in ready.journal.tuning(LINE).error.message

    def test_settling_leaves_a_tuning_alone_that_another_process_does(self, ready) -> None:
        seen = []

        def look(job: str) -> None:
            if job == "tune":
                LineTuner(ready.config, ready.journal, ready.trust, ready.jobs).settle(LINE)
                seen.append(ready.journal.tuning(LINE).phase)

        ready.jobs.before = look
        assert tuner(ready).tune(LINE, ready.given).phase == "done"
        assert seen == ["tuning"]


class TestByItself:
    def worker(self, device) -> TuneWorker:
        return TuneWorker(device.config, device.journal, tuner(device))

    def run(self, worker: TuneWorker) -> None:
        worker.go_on()
        while worker._background.is_running():
            time.sleep(0.005)

    def test_when_enough_new_frames_were_named_and_not_before(self, ready) -> None:
        configure(ready, tune_after=4)
        worker = self.worker(ready)
        named(ready, 3)
        self.run(worker)
        assert ready.journal.tuning(LINE) is None
        named(ready, 1, start=3)
        self.run(worker)
        record = ready.journal.tuning(LINE)
        assert (record.trigger, record.phase) == ("named", "done")
        self.run(worker)
        named(ready, 3, start=4)
        self.run(worker)
        assert len(ready.jobs.requests) == 1
        named(ready, 1, start=7)
        self.run(worker)
        assert len(ready.jobs.requests) == 2

    def test_never_without_the_key(self, ready) -> None:
        named(ready, 50)
        self.run(self.worker(ready))
        assert ready.journal.tuning(LINE) is None

    def test_a_failure_is_not_repeated_until_more_were_named(self, ready) -> None:
        configure(ready, tune_after=2)
        ready.jobs.fail = {"tune": JobCrashedError("crashed")}
        named(ready, 2)
        worker = self.worker(ready)
        for _ in range(3):
            self.run(worker)
            worker._retry_at.clear()
        assert len(ready.jobs.requests) == 1
        named(ready, 2, start=2)
        self.run(worker)
        assert len(ready.jobs.requests) == 2

    @pytest.mark.parametrize("error", [JobCrashedError("crashed"), KeyboardInterrupt(), Killed()])
    def test_a_tuning_by_hand_that_comes_to_no_end_uses_no_frames(self, ready, error) -> None:
        configure(ready, tune_after=4)
        named(ready, 4)
        ready.jobs.fail = {"tune": error}
        with pytest.raises(type(error)):
            tuner(ready).tune(LINE, ready.given)
        ready.jobs.fail = {}
        ready.restart()
        worker = self.worker(ready)
        self.run(worker)
        record = ready.journal.tuning(LINE)
        assert (record.trigger, record.phase) == ("named", "done")

    def test_one_that_comes_to_its_end_uses_them_and_only_once(self, ready) -> None:
        configure(ready, tune_after=4)
        named(ready, 4)
        tuner(ready).tune(LINE, ready.given)
        self.run(self.worker(ready))
        assert ready.journal.tuning(LINE).trigger == "asked"

    def test_a_bundle_that_cannot_be_tuned_is_not_tried_every_second(self, ready) -> None:
        configure(ready, tune_after=2)
        (ready.slots.folder("a") / "train_step.onnx").unlink()
        named(ready, 2)
        worker = self.worker(ready)
        for _ in range(3):
            self.run(worker)
            worker._retry_at.clear()
        assert ready.journal.tuning(LINE).phase == "failed"
        assert [call for call in ready.jobs.calls if call[0] == "tune"] == []

    def test_killed_again_and_again_it_is_given_up(self, ready, monkeypatch) -> None:
        configure(ready, tune_after=2)
        named(ready, 2)

        def end(job: str) -> None:
            if job == "tune":
                raise Killed

        ready.jobs.before = end
        for _ in range(5):
            ready.restart()
            worker = self.worker(ready)
            self.run(worker)
            with pytest.raises(Killed):
                worker.pause()
            if ready.journal.tuning(LINE).attempts == 3:
                break
        ready.restart()
        self.run(self.worker(ready))
        assert len(ready.jobs.requests) == 3
        assert ready.journal.tuning(LINE).phase == "interrupted"

        ready.jobs.before = lambda _job: None
        named(ready, 2, start=2)  # given up is that one, and not tuning for ever
        self.run(self.worker(ready))
        record = ready.journal.tuning(LINE)
        assert (record.phase, record.attempts) == ("done", 1)

    def test_a_hot_board_only_puts_it_off(self, ready, monkeypatch) -> None:
        configure(ready, tune_after=2)
        named(ready, 2)
        worker = self.worker(ready)
        with monkeypatch.context() as patch:
            patch.setattr(module, "hottest_celsius", lambda: 88.0)
            self.run(worker)
            assert not worker.is_open()
        assert ready.journal.tuning(LINE) is None
        worker._retry_at.clear()
        self.run(worker)
        assert ready.journal.tuning(LINE).phase == "done"

    def test_a_tuning_by_hand_that_is_killed_beside_the_agent_is_settled(self, ready, monkeypatch) -> None:
        worker = self.worker(ready)
        self.run(worker)

        def end(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, "with_active", end)
            with pytest.raises(Killed):
                tuner(ready).tune(LINE, ready.given)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
        worker.go_on()
        assert ready.journal.tuning(LINE).phase == "done"
        assert ready.journal.line(LINE).state.model_digest == ready.slots.active().model_digest

    def test_it_makes_way_for_an_update_and_comes_back(self, ready) -> None:
        configure(ready, tune_after=2)
        named(ready, 2)
        begun = threading.Event()
        original = ready.jobs.tune

        def slow(request, limits):
            begun.set()
            assert limits.cancel.wait(10)
            raise JobCancelledError("stopped")

        ready.jobs.tune = slow
        worker = self.worker(ready)
        worker.go_on()
        assert begun.wait(10)
        worker.pause()
        record = ready.journal.tuning(LINE)
        assert (record.phase, record.attempts) == ("interrupted", 0)
        ready.jobs.tune = original
        self.run(worker)
        assert ready.journal.tuning(LINE).phase == "done"


def test_newly_named_counts_from_the_newest_that_still_holds() -> None:
    answers = [f"a{number}" for number in range(10)]
    assert newly_named(answers, answers[3:6]) == 4
    assert newly_named(answers, [*answers[3:6], "undone"]) == 4
    assert newly_named(answers, ["undone"]) == 10
    assert newly_named(answers, answers) == 0
    assert newly_named([], []) == 0


def test_memory_and_time_are_bounded(ready, monkeypatch) -> None:
    request = tune_request(ready.config, LINE, "bench", "model.onnx", seconds=50.0)
    assert request.max_seconds == 50.0
    assert request.providers == ready.config.lines[LINE].providers
    monkeypatch.setattr("kiridashi_agent.tune_terms.available_bytes", lambda: 300 * MIB)
    assert tune_limits(ready.config, request, None).memory_bytes == (300 - 64) * MIB
    monkeypatch.setattr("kiridashi_agent.tune_terms.available_bytes", lambda: 70 * MIB)
    assert tune_limits(ready.config, request, None).memory_bytes == LEAST_BYTES
    limits = msgspec.structs.replace(ready.config.limits, tune_memory_mib=128, job_timeout_s=10.0)
    config = msgspec.structs.replace(ready.config, limits=limits)
    bounds = tune_limits(config, request, None)
    assert (bounds.memory_bytes, bounds.seconds) == (128 * MIB, 350.0)


class TestANewBundle:
    def test_it_is_tuned_again_from_what_was_kept(self, ready) -> None:
        tuner(ready).tune(LINE, ready.given)
        keep_samples(ready)
        ready.jobs.artifact = ""
        ready.transport.want(2, press_3=V2)
        state = ready.settle()
        assert (state.phase, state.version, state.tuned) == ("active", 2, True)
        assert state.tuning.startswith("tuned on 24 samples")

    def test_or_it_says_why_not(self, ready) -> None:
        tuner(ready).tune(LINE, ready.given)
        ready.transport.want(2, press_3=V2)
        state = ready.settle()
        assert (state.version, state.tuned) == (2, False)
        assert "not carried over; model.onnx is untuned: there are no samples" in state.tuning

    @pytest.fixture
    def coded(self, ready, fleet, tmp_path):
        """The next version's int8 file can be tuned, and is the quickest; something was learnt before."""
        tuner(ready).tune(LINE, ready.given)
        keep_samples(ready)
        budget = Budget(latency_p95_ms=4.0)
        fleet.publish(tmp_path / "coded", make_bundle(tmp_path / "coded", version=3, budget=budget, coded=True))
        ready.jobs.p95_ms = {"model.int8.onnx": 1.0, "model.onnx": 2.0, "model.tflite": 3.0}
        ready.transport.want(2, press_3="lines/press-3/3.json")
        return ready

    def test_a_quantised_file_is_tuned_and_chosen_where_it_is_the_fastest(self, coded) -> None:
        coded.jobs.artifact = ""
        state = coded.settle()
        assert (state.phase, state.version, state.artifact, state.tuned) == ("active", 3, "model.int8.onnx", True)
        assert coded.slots.active().artifact == "model.int8.onnx"
        chosen = next(trial for trial in state.trials if trial.chosen)
        assert (chosen.artifact, state.measured.latency_p95_ms) == ("model.int8.onnx", 1.0)

    def test_if_it_loses_too_much_by_it_the_tuned_float_file_goes_on(self, coded) -> None:
        coded.jobs.artifact = "model.onnx"
        state = coded.settle()
        assert (state.artifact, state.tuned, state.measured.latency_p95_ms) == ("model.onnx", True, 2.0)
        reasons = {trial.artifact: (trial.chosen, trial.reason) for trial in state.trials}
        assert reasons["model.onnx"] == (True, "the fastest that keeps what was tuned")
        assert reasons["model.int8.onnx"] == (False, "lost too much with tuned weights")

    def test_unless_that_is_over_the_budget(self, coded) -> None:
        coded.jobs.artifact = "model.onnx"
        coded.jobs.p95_ms["model.onnx"] = 9.0
        state = coded.settle()
        assert (state.artifact, state.tuned) == ("model.int8.onnx", False)
        assert "model.int8.onnx is untuned: tuned, model.onnx would be over the budget" in state.tuning
        assert "not carried over" in state.tuning

    def test_when_no_float_file_is_inside_the_budget_it_says_that(self, ready, fleet, tmp_path) -> None:
        tuner(ready).tune(LINE, ready.given)
        keep_samples(ready)
        fleet.publish(tmp_path / "tight", make_bundle(tmp_path / "tight", version=3, budget=Budget(latency_p95_ms=2.0)))
        ready.jobs.p95_ms = {"model.onnx": 9.0, "model.tflite": 9.0, "model.int8.onnx": 1.0}
        ready.transport.want(2, press_3="lines/press-3/3.json")
        state = ready.settle()
        assert (state.artifact, state.tuned) == ("model.int8.onnx", False)
        assert "no float32 file is inside the budget" in state.tuning


def keep_samples(device) -> None:
    """What the child would have kept."""
    data = np.zeros(48, np.uint8).tobytes()
    KeptSamples(device.state, LINE).write([(KeptFrame(frame_key(4, 4, data), "dent", False, 4, 4), data)], {})
