"""``kiridashi-agent`` as a process, over a real broker, with real child processes."""

from __future__ import annotations

import json
import random
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from agent_program import BINARY, AgentProgram, finished, last_report, wait_for
from fake_fleet import MqttResponder, free_port
from kiridashi.artifacts import describe_file
from kiridashi.budget import MIB, Budget
from kiridashi.manifest import CHUNK_BYTES
from kiridashi.messages import Desired, LineDesired
from kiridashi.slots import LineSlots
from kiridashi_agent.machine import resident_bytes
from label_place import fill
from tiny_bundle import LABELS, device_tiles, make_bundle, write_device_samples

V1, V2 = "lines/press-3/1.json", "lines/press-3/2.json"
WINDOW = 4


def want(responder: MqttResponder, generation: int, target: str) -> None:
    responder.want("cam-1", Desired(generation, {"press-3": LineDesired(target)}))


@pytest.fixture
def published(fleet, tmp_path):
    for version in (1, 2):
        folder = tmp_path / f"bundle-{version}"
        fleet.publish(folder, make_bundle(folder, version=version, seed=version))
    return fleet


def test_from_nothing_to_a_tuned_model_and_back(program, responder, published, tmp_path) -> None:
    write_device_samples(tmp_path / "samples", per_class=12)
    program.configure(samples=tmp_path / "samples", runtime="onnxruntime")
    want(responder, 1, V1)
    code, report = program.once()
    line = report["lines"]["press-3"]
    assert (code, line["phase"], line["tuned"]) == (0, "active", True), line
    assert line["tune"]["accuracy_after"] > line["tune"]["accuracy_before"]
    assert line["measured"]["memory_bytes"] > 20 * MIB
    assert last_report(responder, "active").lines["press-3"].model_digest == line["model_digest"]

    images, labels = device_tiles(4, seed=99)
    np.save(tmp_path / "frames.npy", images)
    code, seen = program.call("predict", "--line", "press-3", str(tmp_path / "frames.npy"))
    right = np.mean([row["label"] == LABELS[n] for row, n in zip(seen["predictions"], labels, strict=True)])
    assert (code, seen["model_digest"]) == (0, line["model_digest"])
    assert right > 0.8

    assert program.call("undo", "--line", "press-3")[1]["active"]["tuned"] is False
    fill(program.state)
    code, status = program.call("status")
    assert status["lines"]["press-3"]["spool"]["waiting"] == 20
    assert status["lines"]["press-3"]["state"]["phase"] == "rolled-back"
    assert status["lines"]["press-3"]["active"]["model_digest"] == make_bundle(tmp_path / "again", seed=1).digest


def test_over_the_budget_is_refused_with_the_measurement(program, responder, published, tmp_path) -> None:
    want(responder, 1, V1)
    assert program.once()[0] == 0
    folder = tmp_path / "tight"
    published.publish(folder, make_bundle(folder, version=3, budget=Budget(memory_bytes=8 * MIB)))
    want(responder, 2, "lines/press-3/3.json")
    code, report = program.once()
    line = report["lines"]["press-3"]
    assert (code, line["phase"], line["verdict"]["exceeded"]) == (20, "rejected", ["memory"])
    assert line["measured"]["memory_bytes"] > 8 * MIB
    assert line["slot"] == "a"
    assert program.call("status")[1]["lines"]["press-3"]["active"]["slot"] == "a"


def test_expired_metadata_is_refused_and_the_old_model_keeps_serving(program, responder, published) -> None:
    want(responder, 1, V1)
    assert program.once()[0] == 0
    published.commit(expires=datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1))
    want(responder, 2, V2)
    code, report = program.once()
    line = report["lines"]["press-3"]
    assert (code, line["phase"], line["error"]["kind"]) == (31, "rejected", "TrustError")
    assert "expired" in line["error"]["message"]
    assert LineSlots(program.state, "press-3").active().slot == "a"


def test_a_download_killed_in_the_middle_goes_on_where_it_was(program, responder, fleet, tmp_path) -> None:
    folder = tmp_path / "big"
    manifest = make_bundle(folder)
    (folder / "train_state.npz").write_bytes(random.Random(0).randbytes(40 * CHUNK_BYTES))
    # The fat file stands in for the probe: whatever is in it, it has to be fetched.
    fat = msgspec.structs.replace(describe_file(folder / "train_state.npz", "probe"), name="fat.npz")
    (folder / "train_state.npz").rename(folder / "fat.npz")
    kept = tuple(entry for entry in manifest.artifacts if entry.kind == "onnx-fp32")
    fleet.publish(folder, msgspec.structs.replace(manifest, artifacts=(*kept, fat), train=None))
    responder.delay_s = 0.03
    want(responder, 1, V1)
    first = program.start("--once")
    wait_for(lambda: len(fleet.chunk_requests()) >= 15)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    first.stderr.close()
    answered = len(fleet.chunk_requests())
    assert answered < 40
    responder.delay_s = 0.0
    code, report = program.once()
    line = report["lines"]["press-3"]
    assert line["error"]["phase"] == "probing"  # a file of noise is no probe: it came all the way to there
    assert code != 0
    asked = fleet.chunk_requests()
    chunks = 40 + sum(len(entry.chunks) for entry in kept)
    assert len(set(asked)) == chunks
    assert len(asked) - chunks <= 2 * WINDOW  # what was open when it died, and what was written but not yet kept
    assert line["delivery"]["resumed_chunks"] >= answered - 2 * WINDOW


def test_the_resident_process_is_small_and_stops_on_request(program, responder, published) -> None:
    process = program.start()
    try:
        wait_for(lambda: last_report(responder, "idle"))
        want(responder, 1, V1)
        report = wait_for(lambda: last_report(responder, "active"))
        assert report.modules_forbidden_loaded == ()
        assert 0 < report.idle_rss_bytes < 40 * MIB
        assert resident_bytes(Path(f"/proc/{process.pid}/status")) < 40 * MIB
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert not any(name in maps for name in ("numpy", "onnxruntime", "litert", "torch", "cryptography"))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=15)
        assert (process.returncode, json.loads(out)) == (0, {"stopped": True})
    finally:
        process.kill()
        process.communicate()


def test_two_agents_on_one_state_folder_are_refused(program, responder) -> None:
    process = program.start()
    try:
        wait_for(lambda: responder.states)
        code, error = program.once()
        assert (code, error["error"]["kind"]) == (60, "StateError")
    finally:
        process.terminate()
        process.communicate(timeout=15)


def test_undo_is_reported_by_the_running_agent(program, responder, published) -> None:
    process = program.start()
    try:
        for generation, target in ((1, V1), (2, V2)):
            want(responder, generation, target)
            wait_for(lambda t=target: (r := last_report(responder, "active")) and r.lines["press-3"].target == t)
        assert program.call("undo", "--line", "press-3")[0] == 0
        report = wait_for(lambda: last_report(responder, "rolled-back"))
        assert report.lines["press-3"].slot == "a"
    finally:
        process.terminate()
        process.communicate(timeout=15)


def test_without_a_broker_once_ends_with_the_network_code(tmp_path, fleet) -> None:
    port = free_port()
    program = AgentProgram(tmp_path / "state", port, fleet)
    code, error = program.once(timeout_s=1)
    assert (code, error["error"]["code"]) == (40, 40)
    assert f"127.0.0.1:{port}" in error["error"]["what"]


def test_without_a_broker_the_service_keeps_trying(tmp_path, fleet) -> None:
    port = free_port()
    process = AgentProgram(tmp_path / "state", port, fleet).start()
    try:
        with pytest.raises(TimeoutError):
            wait_for(lambda: process.poll() is not None, timeout_s=3, error=TimeoutError)
        process.terminate()
        _, log = process.communicate(timeout=15)
        assert process.returncode == 0
        assert log.count("cannot be reached; trying again") == 1
    finally:
        process.kill()
        process.communicate()


def test_doctor_names_what_is_missing(program, broker, tmp_path, fleet) -> None:
    code, found = program.call("doctor")
    assert (code, found["healthy"]) == (0, True), found
    assert {check["name"] for check in found["checks"]} >= {"broker", "clock", "runtimes", "memory limit", "disk"}
    code, found = AgentProgram(tmp_path / "other", free_port(), fleet).call("doctor")
    (failed,) = [check for check in found["checks"] if check["result"] == "failed"]
    assert (code, failed["name"]) == (40, "broker")
    assert "Connection refused" in failed["detail"]


def test_measure_judges_files(tmp_path) -> None:
    make_bundle(tmp_path / "bundle")
    files = [str(tmp_path / "bundle" / name) for name in ("model.onnx", "model.tflite")]
    code, found = finished([*BINARY, "measure", *files, "--budget", "memory=4MiB", "--json"])
    assert code == 20
    assert [row["verdict"]["exceeded"] for row in found["files"]] == [["memory"], ["memory"]]
    assert finished([*BINARY, "measure", files[0], "--budget", "memory=2GiB", "--json"])[0] == 0
