"""A line learns from what its workers name: the installed commands, a line application that never stops, no server."""

from __future__ import annotations

import subprocess
import time

import numpy as np
from agent_program import wait_for
from installed import Device, deliver, environment, killed_at_the_end, wait_until_killed
from kiridashi import LineModel
from kiridashi.samples import write_samples
from kiridashi.slots import LineSlots
from kiridashi.spool import Spool, SpoolFolder, SpoolLimits
from kiridashi_agent.journal import Journal
from kiridashi_agent.label.session import LabelGoal, LabelSession
from tiny_bundle import LABELS, device_tiles

LINE = "press-3"
LIMITS = SpoolLimits(filling_s=0.001, full_s=0.001, free_disk_bytes=0)


def run_line(device: Device, per_class: int, seed: int) -> None:
    """The line predicts frames of its camera, and offers them to the spool."""
    spool = Spool.open(LINE, device.state, LIMITS)
    with LineModel.open(LINE, device.state, spool=spool) as model:
        for image in device_tiles(per_class, seed)[0]:
            model.predict(image)
            time.sleep(0.004)
    spool.close()
    assert spool.counts().failed == 0


def name_frames(device: Device, seeds: tuple[int, ...], per_class: int) -> int:
    """A worker names what the page shows, until nothing waits; how many there were."""
    truth = {}
    for seed in seeds:
        images, classes = device_tiles(per_class, seed)
        truth |= {image.tobytes(): LABELS[label] for image, label in zip(images, classes, strict=True)}
    session = LabelSession(SpoolFolder(device.state, LINE), LabelGoal(LABELS, "sha256:any", per_class=50))
    named = 0
    while entry := session.view().entry:
        frame = session.frame(entry)
        assert frame is not None
        session.answer(entry, "class", truth[frame.pixels], "KT", time.time())
        named += 1
    return named


def accuracy(model: LineModel) -> float:
    images, classes = device_tiles(25, seed=900)
    return float((model.predict(images).indices == classes).mean())


def served(model: LineModel) -> str:
    """What serves the next frame: a prediction also makes the model look whether there is another one."""
    return model.predict(np.zeros((16, 16, 3), np.uint8)).model_digest


def test_named_frames_tune_the_model_that_serves_and_undo_takes_it_back(plant, device, tmp_path) -> None:
    run_line(device, per_class=20, seed=5)
    named = name_frames(device, (5,), 20)
    assert named > 60
    slots = LineSlots(device.state, LINE)
    shipped = slots.active()
    code, plan = device.run("tune", "--line", LINE, "--dry-run")
    assert (code, plan["sources"], plan["shortage"]) == (0, {"named": named}, "")
    assert sum(found["learn"] + found["holdout"] for found in plan["classes"].values()) == named
    assert slots.active() == shipped
    assert not (device.state / "spool" / LINE / "kept.zip").exists()

    with LineModel.open(LINE, device.state) as model:
        before = accuracy(model)
        assert served(model) == shipped.model_digest
        done = device.succeed("tune", "--line", LINE)
        assert done["kept"], done
        tuned = slots.active()
        assert (tuned.tuned, tuned.model_digest) == (True, done["active"]["model_digest"])
        wait_for(lambda: served(model) == tuned.model_digest)
        assert accuracy(model) > max(0.9, before + 0.2)
        assert model.swap_error is None

        device.succeed("undo", "--line", LINE, "--to", "previous")
        wait_for(lambda: served(model) == shipped.model_digest)
        assert accuracy(model) == before

    status = device.succeed("status")["lines"][LINE]
    assert status["tuning"]["phase"] == "done"
    assert sum(status["kept"].values()) == named
    assert status["active"]["tuned"] is False


def test_what_was_given_once_tunes_the_next_bundle_too(plant, device, tmp_path) -> None:
    images, classes = device_tiles(10, seed=6)
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
        folder = tmp_path / "pictures" / LABELS[label]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", image)
    code, refused = device.run("tune", "--line", LINE)
    assert (code, refused["error"]["kind"]) == (60, "StateError")
    assert device.succeed("tune", "--line", LINE, "--samples", tmp_path / "pictures")["report"]["sources"] == {
        "given": 40
    }

    line = deliver(plant, device, 2)
    assert line["tuned"], line
    assert line["tune"]["sources"] == {"kept": 40}
    assert "(kept 40)" in line["tuning"]

    assert device.succeed("tune", "--line", LINE, "--forget")["forgotten"] == 40
    line = deliver(plant, device, 3)
    assert not line["tuned"]
    assert "not carried over" in line["tuning"]


def test_killed_while_it_tunes_the_old_model_serves_and_the_next_start_says_so(plant, device, tmp_path) -> None:
    images, classes = device_tiles(10, seed=6)
    write_samples(tmp_path / "given.npz", images, classes)
    slots, journal = LineSlots(device.state, LINE), Journal(device.state / "journal")
    shipped = slots.active()
    command = [str(device.agent), "tune", "--line", LINE, "--samples", str(tmp_path / "given.npz")]
    command += ["--state", str(device.state)]

    def phase() -> str:
        record = journal.tuning(LINE)
        return record.phase if record else ""

    with LineModel.open(LINE, device.state) as model:
        before = accuracy(model)
        with (
            (tmp_path / "tune.log").open("wb") as log,
            killed_at_the_end(subprocess.Popen(command, stdout=log, stderr=log, env=environment())) as tuning,
        ):
            wait_until_killed(tuning, lambda: phase() == "tuning", timeout_s=60)
        assert slots.active() == shipped
        command = [str(device.agent), "run", "--state", str(device.state)]
        with (
            (device.state / "agent.log").open("wb") as log,
            killed_at_the_end(subprocess.Popen(command, stdout=log, stderr=log, env=environment())),
        ):
            wait_for(lambda: phase() == "interrupted", timeout_s=60)
        assert "interrupted" in device.succeed("status")["lines"][LINE]["state"]["tuning"]
        assert accuracy(model) == before
        assert served(model) == shipped.model_digest
    assert not slots.folder("bench").exists()
    assert device.succeed("tune", "--line", LINE, "--samples", tmp_path / "given.npz")["kept"]


def test_the_agent_tunes_by_itself_when_enough_were_named(plant, device) -> None:
    config = device.state / "config.toml"
    head = f"[lines.{LINE}]\n"
    config.write_text(config.read_text().replace(head, f"{head}tune_after = 40\n"))
    command = [str(device.agent), "run", "--state", str(device.state)]
    slots = LineSlots(device.state, LINE)
    with (
        (device.state / "agent.log").open("wb") as log,
        killed_at_the_end(subprocess.Popen(command, stdout=log, stderr=log, env=environment())),
    ):
        run_line(device, per_class=20, seed=5)
        assert not slots.active().tuned
        assert name_frames(device, (5,), 20) >= 40
        wait_for(lambda: slots.active().tuned, timeout_s=60)
        with LineModel.open(LINE, device.state) as model:
            assert accuracy(model) > 0.9
        record = wait_for(lambda: (r := device.succeed("status")["lines"][LINE]["tuning"])["phase"] == "done" and r)
    assert record["trigger"] == "named"
