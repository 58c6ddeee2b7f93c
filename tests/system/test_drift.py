"""A plant, a device, a line whose lamp fails: the agent's process notices, the server shows it, people are asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from agent_program import wait_for
from installed import AGENT, Device, Plant, background, environment
from tiny_bundle import make_bundle

# A line application: 400 frames as on the server, then as many under a weaker lamp; every frame is sampled.
LINE_APPLICATION = """
import sys, time
import numpy as np
from kiridashi import LineModel
from kiridashi.spool import Spool, SpoolLimits
from tiny_bundle import server_tiles

images, _ = server_tiles(200, seed=6)
images = images[np.random.default_rng(6).permutation(len(images))]
light = float(sys.argv[2])
spool = Spool.open("press-3", sys.argv[1], SpoolLimits(sample_s=0.0, sample_write_s=0.2, free_disk_bytes=0))
with LineModel.open("press-3", sys.argv[1], spool=spool) as model:
    for number, image in enumerate(images[:400]):
        model.predict((image * light).astype(np.uint8))
        while spool.sampler.noted <= number:
            time.sleep(0.001)
spool.close()
"""


def run_line(device: Device, light: float) -> None:
    command = [sys.executable, "-c", LINE_APPLICATION, str(device.state), str(light)]
    assets = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, env=environment(assets), timeout=120, check=True)


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    plant = Plant(tmp_path_factory.mktemp("plant"))
    plant.run("line", "add", "press-3")
    with plant.serving():
        yield plant


@pytest.mark.timeout(600)
def test_a_lamp_that_fails_is_seen_by_the_agent_and_shown_by_the_server(plant) -> None:
    device = plant.enrol()
    make_bundle(plant.folder / "bundle")
    plant.publish(plant.folder / "bundle")
    config = device.state / "config.toml"
    text = config.read_text().replace("[lines.press-3]\n", "[lines.press-3]\nreference_frames = 200\n")
    assert "[limits]" not in text
    config.write_text(f"{text}\n[limits]\nwatch_every_s = 0.5\n")
    code, line = device.once()
    assert (code, line["phase"]) == (0, "active"), line

    agent = [AGENT, "run", "--state", device.state]
    with background(agent, device.state / "agent.log", "connected to the broker"):
        run_line(device, 1.0)
        calm = wait_for(lambda: watching(device), timeout_s=60)
        assert calm["findings"] == []
        run_line(device, 0.6)
        wait_for(lambda: plant.run("fleet", "show", "cam-1")["drift"], timeout_s=60)
    shown = plant.run("fleet", "show", "cam-1")
    finding = shown["drift"][0]
    assert (finding["line"], finding["reference"], finding["signal"]) == ("press-3", "line", "image")
    assert finding["p_value"] < 0.01
    assert finding["examples"]
    assert "drift" in [event["kind"] for event in shown["events"]]
    assert shown["reported"]["modules_forbidden_loaded"] == []

    said = device.succeed("drift", "--line", "press-3")["lines"]["press-3"]
    assert said["findings"][0]["statistic"] == finding["statistic"]
    assert device.succeed("status")["lines"]["press-3"]["spool"]["waiting"] >= len(finding["examples"])


def watching(device: Device) -> dict | None:
    drift = device.succeed("drift")["lines"]["press-3"]
    return drift if drift is not None and drift["phase"] == "watching" else None
