from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.artifacts import sha256_file
from kiridashi.errors import BundleError, ExitCode, InputError, RuntimeUnavailableError, StateError, TrustError
from kiridashi.manifest import Code, Manifest, TrainSpec, TrainVariant
from kiridashi.recode import recode
from kiridashi.samples import write_samples
from kiridashi.slots import Active
from kiridashi.trust import load_public_key, read_seal, verify_seal
from kiridashi_agent import finetune, jobs, tuned_files
from kiridashi_agent.jobs import TuneOutcome, TuneRequest, survey, tune
from kiridashi_agent.patching import read_parameters
from kiridashi_agent.process import JobCancelledError, JobTimeoutError, Limits, MemoryLimitError
from kiridashi_agent.thermostat import Thermostat

from tests.assets.tiny_bundle import (
    BIAS,
    CLASSES,
    HEAD_WEIGHT,
    LABELS,
    PARAMETERS,
    device_tiles,
    make_bundle,
    write_device_samples,
)
from tests.integration.device_runtime.conftest import Device, install


def request(device: Device, artifact: str = "model.onnx", **changes: Any) -> TuneRequest:
    base = TuneRequest(
        state_dir=str(device.state_dir),
        line="press-3",
        slot="b",
        artifact=artifact,
        samples=str(device.samples),
        device="dev-1",
    )
    return msgspec.structs.replace(base, **changes)


@pytest.fixture
def ready(device: Device, shipped: Path) -> Device:
    """The device with the same bundle in slot b too, where it may be tuned."""
    install(device.slots, "b", shipped)
    return device


def change_manifest(device: Device, **changes: Any) -> None:
    path = device.slots.folder("b") / "manifest.json"
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    path.write_bytes(msgspec.structs.replace(manifest, **changes).encode())


def change_spec(device: Device, **changes: Any) -> None:
    spec = device.manifest.train
    assert isinstance(spec, TrainSpec)
    change_manifest(device, train=msgspec.structs.replace(spec, **changes))


def slot_files(device: Device) -> set[str]:
    return {path.name for path in device.slots.folder("b").iterdir()}


@pytest.mark.parametrize(
    ("artifact", "used"),
    [("model.onnx", "model.onnx"), ("model.tflite", "model.tflite"), ("model.int8.onnx", "model.onnx")],
)
def test_tuning_wins_is_sealed_and_serves(ready: Device, artifact: str, used: str) -> None:
    outcome = tune(request(ready, artifact))
    report = outcome.report
    assert outcome.artifact == used
    assert report.kept, report.reason
    assert (report.samples, report.holdout, report.iterations) == (24, 8, 12)
    assert report.accuracy_before <= 0.6 < 0.9 < report.accuracy_after
    assert report.loss_last < report.loss_first
    assert 0 < report.peak_rss_bytes < 200 << 20

    tuned = ready.slots.folder("b") / "tuned"
    seal = read_seal(tuned)
    verify_seal(seal, load_public_key(ready.state_dir))
    assert (seal.parent, seal.device, seal.digest) == (ready.manifest.digest, "dev-1", outcome.model_digest)
    assert seal.artifacts == {name: sha256_file(tuned / name) for name in ("model.onnx", "model.tflite")}
    assert report.stale == ("model.int8.onnx",)
    assert seal.values == sha256_file(tuned / "tuned.npz")

    images, labels = device_tiles(20, 900)
    with LineModel.open("press-3", ready.state_dir) as before:
        assert (before.predict(images).indices == labels).mean() < 0.6
    ready.slots.activate(Active(slot="b", artifact=used, model_digest=outcome.model_digest, tuned=True))
    with LineModel.open("press-3", ready.state_dir) as after:
        prediction = after.predict(images)
        assert (prediction.indices == labels).mean() > 0.95
        assert prediction.model_digest == outcome.model_digest


def test_sealed_values_are_those_in_the_file(ready: Device) -> None:
    tune(request(ready))
    tuned = ready.slots.folder("b") / "tuned"
    in_file = read_parameters(tuned / "model.onnx", ready.manifest.artifact("model.onnx").patches)
    shipped = read_parameters(ready.slots.folder("b") / "model.onnx", ready.manifest.artifact("model.onnx").patches)
    with np.load(tuned / "tuned.npz") as values:
        for name in PARAMETERS:
            np.testing.assert_array_equal(values[name], in_file[name])
            assert not np.array_equal(in_file[name], shipped[name])


def test_same_seed_same_digest(ready: Device, shipped: Path) -> None:
    def digest(seed: int) -> str:
        install(ready.slots, "b", shipped)
        return tune(request(ready, seed=seed)).model_digest

    assert digest(1) == digest(1) != digest(2)


def test_class_names_as_labels_and_head_only(ready: Device) -> None:
    write_device_samples(ready.samples, named=True)
    report = tune(request(ready, iterations=0)).report
    assert report.iterations == 0
    assert report.kept
    assert report.accuracy_after == report.accuracy_head > report.accuracy_before


def test_a_worse_model_is_not_kept(ready: Device) -> None:
    images, labels = device_tiles(8, 5)
    holdout = np.arange(len(labels)) % 8 < 4
    mislabelled = np.where(holdout, labels, (labels + 2) % CLASSES)
    write_samples(ready.samples / "commissioning.npz", images, mislabelled, holdout)
    outcome = tune(request(ready))
    assert not outcome.report.kept
    assert "fell from" in outcome.report.reason
    assert (outcome.artifact, outcome.model_digest) == ("model.onnx", "")
    assert not {"tuned", "tuned.part"} & slot_files(ready)


@pytest.mark.parametrize(("part", "words"), [("learn", "sample to learn from"), ("hold", "hold-out sample")])
def test_every_class_is_needed_on_both_sides(ready: Device, part: str, words: str) -> None:
    images, labels = device_tiles(8, 5)
    holdout = np.arange(len(labels)) % 8 < 4
    holdout[labels == 2] = part == "learn"
    write_samples(ready.samples / "commissioning.npz", images, labels, holdout)
    report = tune(request(ready)).report
    assert not report.kept
    assert f"no {words} of class '{LABELS[2]}'" in report.reason


def test_diverging_iterations_leave_the_head(ready: Device) -> None:
    change_spec(ready, learning_rate=1e30)
    report = tune(request(ready)).report
    assert report.kept
    assert "diverged" in report.reason
    assert report.accuracy_after == report.accuracy_head


def test_iterations_are_bounded_in_time(ready: Device) -> None:
    report = tune(request(ready, iterations=10_000_000, max_seconds=0.3)).report
    assert 1 < report.iterations < 10_000_000
    assert (report.kept, report.bound) == (True, "time")


def test_iterations_that_do_harm_end_early_and_what_was_good_is_kept(ready: Device) -> None:
    change_spec(ready, learning_rate=30.0)
    write_device_samples(ready.samples, per_class=80)
    report = tune(request(ready, iterations=400)).report
    assert (report.bound, report.samples, report.holdout) == ("overfitting", 240, 80)
    assert report.best_iteration == 0 < 300 <= report.iterations < 400
    assert "only the head was changed" in report.reason
    assert report.kept, report.reason
    assert report.accuracy_after > 0.9


def test_a_hot_board_ends_the_iterations_and_the_report_says_so(ready: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]

    def sleep(seconds: float) -> None:
        passed[0] += seconds

    def thermostat(limit: float) -> Thermostat:
        return Thermostat(limit, lambda: 90.0, lambda: time.monotonic() + passed[0], sleep)

    monkeypatch.setattr(finetune, "Thermostat", thermostat)
    report = finetune.run(request(ready, max_celsius=80.0)).report
    assert (report.iterations, report.bound, report.celsius) == (1, "temperature", 90.0)
    assert report.paused_s >= 120
    cool = finetune.run(request(ready, max_celsius=95.0)).report
    assert (cool.iterations, cool.bound, cool.paused_s) == (12, "", 0.0)


def test_the_memory_of_a_tuning_is_bounded_and_the_error_says_so(ready: Device) -> None:
    before = slot_files(ready)
    with pytest.raises(MemoryLimitError, match="limit of 40 MiB") as caught:
        tune(request(ready), Limits(60, memory_bytes=40 << 20))
    assert caught.value.exit_code == ExitCode.TUNE
    assert slot_files(ready) == before


def test_both_files_carry_the_tuned_weights(ready: Device) -> None:
    outcome = tune(request(ready))
    images, labels = device_tiles(20, 900)
    seen = []
    for artifact in ("model.onnx", "model.tflite"):
        ready.slots.activate(Active(slot="b", artifact=artifact, model_digest=outcome.model_digest, tuned=True))
        with LineModel.open("press-3", ready.state_dir) as model:
            seen.append(model.predict(images))
    np.testing.assert_allclose(seen[0].values, seen[1].values, atol=1e-4)
    assert (seen[1].indices == labels).mean() > 0.95


def test_a_stale_file_cannot_be_served_as_tuned(ready: Device) -> None:
    outcome = tune(request(ready))
    stale = outcome.report.stale[0]
    with pytest.raises(StateError, match="not complete"):
        ready.slots.activate(Active(slot="b", artifact=stale, model_digest=outcome.model_digest, tuned=True))
    shutil.copy(ready.slots.folder("b") / stale, ready.slots.folder("b") / "tuned" / stale)
    ready.slots.activate(Active(slot="b", artifact=stale, model_digest=outcome.model_digest, tuned=True))
    with pytest.raises(TrustError, match="not the file that was sealed"):
        LineModel.open("press-3", ready.state_dir)


@pytest.fixture
def coded(device: Device, tmp_path: Path) -> Device:
    """As ``ready``, and the manifest says how the int8 file holds its parameters."""
    make_bundle(tmp_path / "coded", coded=True)
    return dataclasses.replace(device, manifest=install(device.slots, "b", tmp_path / "coded"))


def test_an_int8_file_is_quantised_anew_and_serves(coded: Device) -> None:
    outcome = tune(request(coded, "model.int8.onnx"))
    report = outcome.report
    assert (outcome.artifact, report.kept, report.stale) == ("model.int8.onnx", True, ())
    assert report.accuracy_before <= 0.6 < 0.9 < report.accuracy_after
    seal = read_seal(coded.slots.folder("b") / "tuned")
    assert set(seal.artifacts) == {"model.onnx", "model.int8.onnx", "model.tflite"}
    coded.slots.activate(Active("b", "model.int8.onnx", outcome.model_digest, tuned=True))
    images, labels = device_tiles(20, 900)
    with LineModel.open("press-3", coded.state_dir) as model:
        assert (model.predict(images).indices == labels).mean() > 0.95


def test_one_that_loses_too_much_by_it_gives_way_to_its_float_sibling(
    coded: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(data: bytes, codes: Sequence[Code], values: dict[str, Any], source: str) -> bytes:
        return recode(data, codes, {name: -value for name, value in values.items()}, source)

    monkeypatch.setattr(tuned_files, "recode", spoilt)
    outcome = finetune.run(request(coded, "model.int8.onnx"))
    report = outcome.report
    assert (outcome.artifact, report.kept, report.stale) == ("model.onnx", True, ("model.int8.onnx",))
    assert "hold-out frames right" in report.stale_reasons["model.int8.onnx"]
    assert set(read_seal(coded.slots.folder("b") / "tuned").artifacts) == {"model.onnx", "model.tflite"}
    assert not (coded.slots.folder("b") / "tuned" / "model.int8.onnx").exists()


def test_files_that_are_not_here_or_have_no_places_are_stale_for_a_reason(ready: Device) -> None:
    (ready.slots.folder("b") / "model.tflite").unlink()
    assert tune(request(ready)).report.stale_reasons == {
        "model.int8.onnx": f"it has no place for {BIAS}",
        "model.tflite": "it is not on this device",
    }


def test_a_file_without_a_place_for_a_changed_parameter_is_stale(ready: Device) -> None:
    def without_bias(artifact: Any) -> Any:
        kept = tuple(patch for patch in artifact.patches if patch.parameter != BIAS)
        return msgspec.structs.replace(artifact, patches=kept) if artifact.name == "model.tflite" else artifact

    change_manifest(ready, artifacts=tuple(without_bias(artifact) for artifact in ready.manifest.artifacts))
    outcome = tune(request(ready))
    assert set(outcome.report.stale) == {"model.int8.onnx", "model.tflite"}
    assert not (ready.slots.folder("b") / "tuned" / "model.tflite").exists()


def test_what_was_learnt_from_is_kept_and_the_serving_model_has_to_be_beaten(ready: Device, shipped: Path) -> None:
    given = request(ready, samples="", given=(str(ready.samples),))
    first = tune(given)
    assert first.report.sources == {"given": 32}
    ready.slots.activate(Active(slot="b", artifact="model.onnx", model_digest=first.model_digest, tuned=True))
    install(ready.slots, "a", shipped)
    serving = str(ready.slots.folder("b") / "tuned")
    second = tune(request(ready, samples="", slot="a", serving=serving)).report
    assert second.sources == {"kept": 32}
    assert (second.samples, second.holdout) == (first.report.samples, first.report.holdout)
    assert second.accuracy_before == first.report.accuracy_after > first.report.accuracy_before


def test_a_survey_counts_and_changes_nothing(ready: Device) -> None:
    found = survey(request(ready, given=()))
    assert found.sources == {"files": 32}
    assert {entry.learn for entry in found.classes.values()} == {6}
    assert {(entry.holdout, entry.refused_from) for entry in found.classes.values()} == {(2, None)}
    assert not (ready.state_dir / "spool").exists()


def sized(device: Device, largest_bytes: int = 0) -> None:
    """Give the bundle two sizes of the train step: the head and the bias, and a larger one that trains the same."""
    spec = device.manifest.train
    assert isinstance(spec, TrainSpec)
    small = TrainVariant("biases", spec.graph, spec.parameters, spec.learning_rate, 1 << 20, 100, 100)
    large = msgspec.structs.replace(small, name="all", peak_bytes=largest_bytes, macs=200)
    change_spec(device, variants=(small, large))


def test_the_largest_size_is_taken_and_the_others_are_told_of(ready: Device) -> None:
    sized(ready)
    report = tune(request(ready)).report
    assert report.kept, report.reason
    assert (report.variant, report.iterations) == ("all", 12)
    assert {cost.name: cost.outcome.split(":")[0] for cost in report.variants} == {
        "biases": "not needed",
        "all": "taken",
    }
    assert all(cost.seconds > 0 for cost in report.variants)


def test_a_size_beyond_the_memory_is_not_even_loaded(ready: Device) -> None:
    sized(ready, largest_bytes=1 << 40)
    report = tune(request(ready)).report
    assert report.kept, report.reason
    assert report.variant == "biases"
    assert "needs more than" in report.variants[1].outcome


def test_a_size_that_is_too_slow_gives_way_to_a_smaller_one(ready: Device) -> None:
    sized(ready)
    report = tune(request(ready, iterations=100_000, max_seconds=0.5)).report
    assert report.variant == "biases"
    assert 1 <= report.iterations < 100_000
    assert "too slow" in report.variants[1].outcome


def test_a_size_that_is_killed_for_memory_gives_way_to_a_smaller_one(
    ready: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized(ready)
    asked: list[TuneRequest] = []

    def run(job: str, asking: TuneRequest, *rest: object, **more: object) -> TuneOutcome:
        asked.append(asking)
        if not asking.skip:
            (ready.slots.folder("b") / jobs.TRYING_NAME).write_text("all")
            raise MemoryLimitError("too large")
        return finetune.run(asking)

    monkeypatch.setattr(jobs, "_run", run)
    report = tune(request(ready)).report
    assert [one.skip for one in asked] == [(), ("all",)]
    assert report.kept, report.reason
    assert report.variant == "biases"
    assert report.variants[1].outcome == "went over the memory limit"
    assert not (ready.slots.folder("b") / jobs.TRYING_NAME).exists()


def test_a_parameter_without_a_place_stays_as_shipped(ready: Device) -> None:
    def without_bias(artifact: Any) -> Any:
        kept = tuple(patch for patch in artifact.patches if patch.parameter != BIAS)
        return msgspec.structs.replace(artifact, patches=kept)

    change_manifest(ready, artifacts=tuple(without_bias(artifact) for artifact in ready.manifest.artifacts))
    outcome = tune(request(ready))
    assert outcome.report.kept
    folder = ready.slots.folder("b")
    patches = ready.manifest.artifact("model.onnx").patches
    before = read_parameters(folder / "model.onnx", patches)
    after = read_parameters(folder / "tuned" / "model.onnx", patches)
    np.testing.assert_array_equal(after[BIAS], before[BIAS])
    assert not np.array_equal(after[HEAD_WEIGHT], before[HEAD_WEIGHT])
    with np.load(folder / "tuned" / "tuned.npz") as values:
        np.testing.assert_array_equal(values[BIAS], before[BIAS])


def test_a_place_that_does_not_hold_the_parameter_is_refused(ready: Device) -> None:
    def moved(artifact: Any) -> Any:
        shifted = tuple(msgspec.structs.replace(patch, offset=patch.offset - 4) for patch in artifact.patches)
        return msgspec.structs.replace(artifact, patches=shifted)

    change_manifest(ready, artifacts=tuple(moved(artifact) for artifact in ready.manifest.artifacts))
    with pytest.raises(BundleError, match="does not hold its values"):
        tune(request(ready))
    assert "tuned" not in slot_files(ready)


def test_bundles_that_cannot_be_tuned(ready: Device) -> None:
    change_spec(ready, parameters=("head.weight", "head.bias", "ghost"))
    with pytest.raises(BundleError, match="lacks parameters"):
        tune(request(ready))
    change_spec(ready, parameters=("head.weight", "head.bias"))
    with pytest.raises(BundleError, match="not the train step that the manifest describes"):
        tune(request(ready))
    change_manifest(ready, train=None)
    with pytest.raises(BundleError, match="no train step"):
        tune(request(ready))


def test_a_changed_byte_in_the_train_step_is_refused(ready: Device) -> None:
    path = ready.slots.folder("b") / "train_step.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="not the file that the manifest lists"):
        tune(request(ready))


def test_no_samples(ready: Device) -> None:
    shutil.rmtree(ready.samples)
    with pytest.raises(InputError, match="holds no samples"):
        tune(request(ready))


def test_tuned_files_in_use_are_not_touched(ready: Device) -> None:
    outcome = tune(request(ready))
    ready.slots.activate(Active(slot="b", artifact="model.onnx", model_digest=outcome.model_digest, tuned=True))
    with pytest.raises(StateError, match="are in use"):
        tune(request(ready))
    ready.slots.rollback()
    assert tune(request(ready)).model_digest == outcome.model_digest
    shutil.rmtree(ready.slots.folder("b"))
    with pytest.raises(StateError, match="nothing in slot b"):
        tune(request(ready))


def test_a_kill_at_any_moment_leaves_nothing_half(ready: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last steps are cut short one after the other, as a power cut would; then tuning is simply done again."""

    class PowerCutError(BaseException):
        pass

    def cut(*_: object, **__: object) -> None:
        raise PowerCutError

    whole: TuneOutcome | None = None
    for name in ("patch_artifact", "_predict", "sign_seal", "write_atomic", "_seal"):
        with monkeypatch.context() as patched:
            patched.setattr(finetune, name, cut)
            with pytest.raises(PowerCutError):
                finetune.run(request(ready))
        assert "tuned" not in slot_files(ready)
        outcome = finetune.run(request(ready))
        assert outcome.report.kept
        whole = whole or outcome
        assert outcome.model_digest == whole.model_digest
        assert "tuned.part" not in slot_files(ready)


def test_killed_and_hung_children_leave_the_slot_as_it_was(ready: Device) -> None:
    before = slot_files(ready)
    endless = request(ready, iterations=10_000_000)
    with pytest.raises(JobTimeoutError) as caught:
        tune(endless, Limits(1.0))
    assert caught.value.exit_code == ExitCode.TUNE
    assert "line press-3 in slot b" in caught.value.what
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(JobCancelledError):
        tune(endless, Limits(60, cancel=cancel))
    assert time.monotonic() - started < 10
    assert slot_files(ready) == before


def test_the_hold_out_is_predicted_by_what_the_line_predicts_with(ready: Device) -> None:
    with pytest.raises(RuntimeUnavailableError, match="none of the providers tensorrt"):
        tune(request(ready, providers=("tensorrt",)))
