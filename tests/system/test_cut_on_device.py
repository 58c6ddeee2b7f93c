"""A cut that a device of the fleet judges: installed commands, a real broker, the agent and its runtime.

The device profiles itself, then measures the candidates of ``kiridashi cut --device``.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
from installed import AGENT, SERVER, Device, Plant, background, succeed
from kiridashi.budget import Budget
from kiridashi.command import main
from kiridashi.errors import BudgetError, InputError
from kiridashi.probes import ProbeReport
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.device import DeviceError
from kiridashi_server.budget.probes import ProbeSettings, make_probe_set
from kiridashi_server.cli import bank
from kiridashi_server.cut_run import Composed, CutRequest, CutRun, Planned
from kiridashi_server.device_judge import DeviceJudge, profile_of
from kiridashi_server.fleet.server import PlantServer
from kiridashi_server.pipeline import Release
from kiridashi_server.stages import Workspace
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import tiny_samples

CUTS = 8
SIDE = 32


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    plant = Plant(tmp_path_factory.mktemp("plant"))
    plant.run("line", "add", "press-3")
    with plant.serving():
        yield plant


@pytest.fixture(scope="module")
def server(plant: Plant) -> Iterator[PlantServer]:
    server = PlantServer.open(plant.state)
    yield server
    server.close()


@pytest.fixture(scope="module")
def task(plant: Plant) -> Path:
    """A folder with a task and a bank that knows it."""
    splits = {"train": tiny_samples(6, 0), "val": tiny_samples(3, 1), "test": tiny_samples(3, 2)}
    folder = plant.folder / "hues"
    save_task_folder(Task("hues", ("red", "green", "blue"), splits), folder)
    learn = (
        "bank",
        "learn",
        "--task",
        folder,
        "--iterations",
        1,
        "--image-size",
        SIDE,
        "--bank",
        plant.folder / "bank",
    )
    assert main("kiridashi", "", bank.COMMANDS, [str(word) for word in learn]) == 0
    return folder


@pytest.fixture(scope="module")
def device(plant: Plant) -> Device:
    """An enrolled device whose agent does not run."""
    return plant.enrol()


def online(device: Device) -> contextlib.AbstractContextManager[object]:
    """The device's agent, running."""
    command = (AGENT, "run", "--state", device.state)
    return background(command, device.state / "agent.log", "")


def cut_words(plant: Plant, task: Path, *words: object) -> tuple[object, ...]:
    fixed = ("--task", task, "--line", "press-3", "--bank", plant.folder / "bank", "--image-size", SIDE)
    return ("cut", *fixed, "--iterations", 1, "--per-class", 3, "--device", "cam-1", "--state", plant.state, *words)


@pytest.fixture(scope="module")
def profiled(plant: Plant, server: PlantServer, device: Device) -> dict:
    """The device's profile, asked for over the broker; before it, there is none."""
    backbone = Backbone.load(image_size=SIDE)
    with pytest.raises(InputError, match="never reported") as caught:
        profile_of(server, "cam-1", backbone)
    assert "kiridashi profile request --device cam-1" in caught.value.next_step
    probes = plant.folder / "probes"
    make_probe_set(backbone, probes, ProbeSettings(cuts=CUTS, cliffs=()))
    plant.run("profile", "publish", probes)
    plant.run("profile", "request", "--device", "cam-1", "--seconds", 20)
    device.run("run", "--once", "--timeout", 60)
    (profile,) = plant.run("profile", "list")["profiles"]
    assert (profile["complete"], profile["graphs"]) == (True, CUTS)
    return profile


def test_the_device_measures_the_cut_and_no_profile_is_replaced(
    plant: Plant, device: Device, task: Path, profiled: dict
) -> None:
    limits = "latency=500ms,file=6MiB"
    words = cut_words(plant, task, "-o", plant.folder / "out", "--budget", limits, "--seconds", 8, "--timeout", 60)
    with online(device):
        data = succeed(SERVER, *words)
    assert data["device"] == "cam-1"
    assert data["corrections"] == 0
    assert data["binding"] == "file"
    measured = data["measured"]
    assert measured["file_bytes"] <= 6 * 1024**2
    assert 0 < measured["quiet_ms"] <= measured["latency_p95_ms"] <= measured["latency_p99_ms"]
    assert (Path(data["bundle"]) / "manifest.json").is_file()
    listed = plant.run("profile", "list")
    assert listed["profiles"] == [profiled]
    assert [one["graphs"] for one in listed["probe_sets"]] == [CUTS]
    noted = [event["kind"] for event in plant.run("fleet", "show", "cam-1")["events"]]
    assert noted.count("profiled") == 2


class Loop:
    """The correction loop against the device, without recovery and export."""

    def __init__(self, server: PlantServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.backbone = Backbone.load(image_size=SIDE)
        rng = np.random.default_rng(0)
        scores = {name: rng.gamma(1.0, size=size).tolist() for name, size in self.backbone.layout.sizes.items()}
        self.composed = Composed("made up", "reuse", "", (), scores)
        self.lines: list[str] = []

    def run(self, budget: Budget, timeout_s: float = 60.0) -> tuple[Planned, DeviceJudge]:
        probes, profile = profile_of(self.server, "cam-1", self.backbone)
        judge = DeviceJudge(self.server, "cam-1", probes, timeout_s=timeout_s, seconds=8.0, say=self.lines.append)
        samples = tiny_samples(4, 0)
        request = CutRequest(
            backbone=self.backbone,
            records=(),
            samples=samples,
            calibration=samples,
            release=Release("press-3", 1, "hues", ("red", "green", "blue")),
            budget=budget,
            profile=profile,
            device="cam-1",
            measure=judge,
        )
        run = CutRun(request, Workspace(self.folder))
        run.__dict__["composed"] = self.composed
        return run.planned, judge


@pytest.fixture
def loop(server: PlantServer, profiled: dict, tmp_path: Path) -> Loop:
    return Loop(server, tmp_path)


def number(server: PlantServer) -> int:
    request = server.registry.profiles.request_of("cam-1")
    return request.number if request else 0


def test_an_offline_device_is_named_in_time_and_its_late_answer_is_found_again(
    server: PlantServer, device: Device, loop: Loop
) -> None:
    budget = Budget(file_bytes=5 * 1024**2)
    begun = time.monotonic()
    with pytest.raises(DeviceError, match="'cam-1' has not measured the cut within 1 s") as caught:
        loop.run(budget, timeout_s=1.0)
    assert time.monotonic() - begun < 20
    assert "it is offline" in caught.value.why
    assert "stands at: asked" in caught.value.why
    assert "kiridashi serve" in caught.value.next_step
    asked = number(server)
    with pytest.raises(DeviceError):
        loop.run(budget, timeout_s=1.0)
    assert number(server) == asked
    device.run("run", "--once", "--timeout", 60)
    planned, judge = loop.run(budget, timeout_s=1.0)
    assert number(server) == asked
    assert planned.measured is not None
    assert planned.measured.file_bytes <= 5 * 1024**2
    # A finished run leaves nothing that the next would take for its own.
    judge.forget()
    digest = server.registry.profiles.request_of("cam-1").probes
    assert server.registry.profiles.answers("cam-1", digest, 1, datetime(2000, 1, 1, tzinfo=UTC)) == ()


@pytest.fixture
def rescale(plant: Plant) -> Iterator[Callable[[float], ProbeReport]]:
    """Makes the stored profile say that the device is ``factor`` times as slow as it is; undone at the end."""
    undo = []

    def scale(factor: float) -> ProbeReport:
        with contextlib.closing(sqlite3.connect(plant.state / "registry.sqlite")) as db:
            (row,) = db.execute("select id, report from profile where probes not in candidate").fetchall()
            report = msgspec.json.decode(row[1], type=ProbeReport)
            timings = tuple(
                msgspec.structs.replace(
                    one,
                    quiet_ms=factor * one.quiet_ms,
                    halves_ms=(factor * one.halves_ms[0], factor * one.halves_ms[1]),
                    p50_ms=factor * one.p50_ms,
                    p95_ms=factor * one.p95_ms,
                )
                for one in report.timings
            )
            text = json.dumps(msgspec.to_builtins(msgspec.structs.replace(report, timings=timings)))
            db.execute("update profile set report = ? where id = ?", (text, row[0]))
            db.commit()
            undo.append(row)
        return report

    yield scale
    with contextlib.closing(sqlite3.connect(plant.state / "registry.sqlite")) as db:
        for identity, text in undo:
            db.execute("update profile set report = ? where id = ?", (text, identity))
        db.commit()


def test_a_device_that_is_slower_than_its_profile_says_is_corrected_once(
    device: Device, loop: Loop, rescale: Callable[[float], ProbeReport]
) -> None:
    true = rescale(0.4)
    limit = 0.85 * true.timings[0].quiet_ms
    budget = Budget(latency_p95_ms=limit)
    with online(device):
        planned, judge = loop.run(budget)
    judge.forget()
    assert planned.corrections == 1
    assert planned.measured is not None
    assert planned.measured.latency_p95_ms <= limit
    assert any("measuring" in line for line in loop.lines)


def test_a_budget_that_the_device_never_keeps_is_refused_once_it_has_measured(
    server: PlantServer, device: Device, loop: Loop, rescale: Callable[[float], ProbeReport]
) -> None:
    true = rescale(0.01)
    before = number(server)
    budget = Budget(latency_p95_ms=0.1 * min(one.quiet_ms for one in true.timings))
    with online(device), pytest.raises(BudgetError):
        loop.run(budget)
    assert number(server) == before + 1
