"""A device's profile by hand: make a probe set, measure it with the agent, fit, and use what was fitted."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from kiridashi import command
from kiridashi.errors import BundleError, ExitCode
from kiridashi.probes import PROBE_SET_NAME
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget import Profile
from kiridashi_server.budget.probes import ProbeSettings, make_probe_set, read_probe_set
from kiridashi_server.budget.requirements import Requirements
from kiridashi_server.cli import bank as bank_cli
from kiridashi_server.cli import cut as cut_cli
from kiridashi_server.cli import front as front_cli
from kiridashi_server.cli import profile as profile_cli
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import tiny_samples

CUTS = 5


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    assert run_make(folder) == 0
    return folder


def run_make(folder: Path) -> int:
    argv = ["profile", "make", "-o", str(folder), "--cuts", str(CUTS), "--image-size", "32", "--json"]
    return command.main("kiridashi", "", profile_cli.COMMANDS, argv)


def test_a_probe_set_starts_with_the_dense_model_and_has_cuts_and_odd_multiples(probes: Path) -> None:
    found = read_probe_set(probes)
    sizes = Backbone.load(image_size=32).layout.sizes
    assert found.graphs[0].widths == sizes
    assert [graph.multiple for graph in found.graphs] == [0] * CUTS + [2, 4, 8]
    for graph in found.graphs[CUTS:]:
        for name, width in graph.widths.items():
            assert width % (2 * graph.multiple) == graph.multiple or width == sizes[name]
    assert len({str(graph.widths) for graph in found.graphs}) == len(found.graphs)


def test_making_it_again_reuses_every_file_and_another_seed_makes_other_cuts(probes: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in probes.glob("*.onnx")}
    assert run_make(probes) == 0
    assert {path: path.stat().st_mtime_ns for path in probes.glob("*.onnx")} == before
    assert len(before) == CUTS + 3


def test_seeds_decide_the_widths(tmp_path: Path) -> None:
    backbone = Backbone.load(image_size=32)
    sets = [make_probe_set(backbone, tmp_path / str(n), ProbeSettings(cuts=3, cliffs=(), seed=n // 2)) for n in (0, 2)]
    assert sets[0].graphs[0] == sets[1].graphs[0]
    assert sets[0].graphs[1].widths != sets[1].graphs[1].widths


def test_a_changed_file_is_refused(probes: Path, tmp_path: Path) -> None:
    for path in probes.iterdir():
        if path.suffix in (".onnx", ".json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = next(tmp_path.glob("cut-*.onnx"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError):
        read_probe_set(tmp_path)
    (tmp_path / PROBE_SET_NAME).unlink()
    with pytest.raises(BundleError, match="not a probe set"):
        read_probe_set(tmp_path)


@pytest.fixture(scope="module")
def report(probes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the agent measured here."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    agent = [str(Path(sys.executable).with_name("kiridashi-agent")), "measure", "--profile", str(probes)]
    subprocess.run([*agent, "-o", str(path), "--seconds", "40"], check=True, capture_output=True)
    return path


def run_fit(probes: Path, report: Path, output: Path, image_size: int = 32) -> int:
    argv = ["profile", "fit", str(report), "--probes", str(probes), "-o", str(output)]
    return command.main("kiridashi", "", profile_cli.COMMANDS, [*argv, "--image-size", str(image_size), "--json"])


def test_measured_by_the_agent_and_fitted(
    probes: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    capsys.readouterr()
    assert run_fit(probes, report, output) == 0
    profile = msgspec.json.decode(output.read_bytes(), type=Profile)
    assert json.loads(capsys.readouterr().out)["multiple"] == profile.multiple
    assert len(profile.points) == CUTS + 3
    assert profile.dense.quiet_ms == max(point.quiet_ms for point in profile.points if not point.multiple)
    assert profile.multiple in (2, 4, 8, 16, 32)
    assert profile.tail >= 1
    assert run_fit(probes, report, output, image_size=64) == ExitCode.INPUT
    assert "32 x 32 pixels" in json.loads(capsys.readouterr().out)["error"]["what"]


@pytest.fixture(scope="module")
def place(probes: Path, report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task, a bank that knows it, and this machine's profile."""
    place = tmp_path_factory.mktemp("place")
    splits = {"train": tiny_samples(6, 0), "val": tiny_samples(3, 1), "test": tiny_samples(3, 2)}
    save_task_folder(Task("hues", ("red", "green", "blue"), splits), place / "hues")
    learn = ["bank", "learn", *of_task(place), "--iterations", "1"]
    assert command.main("kiridashi", "", bank_cli.COMMANDS, learn) == 0
    assert run_fit(probes, report, place / "profile.json") == 0
    return place


def of_task(place: Path) -> list[str]:
    return ["--task", str(place / "hues"), "--bank", str(place / "bank"), "--image-size", "32"]


def test_a_front_of_latency_with_the_measured_profile(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = msgspec.json.decode((place / "profile.json").read_bytes(), type=Profile)
    capsys.readouterr()
    argv = ["front", *of_task(place), "--size", "latency", "--profile", str(place / "profile.json"), "--points", "4"]
    assert command.main("kiridashi", "", front_cli.COMMANDS, [*argv, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    requirements = Requirements.of(profile, Backbone.load(image_size=32).quantities)
    assert points[-1]["importance"] == pytest.approx(1.0)
    for point in points:
        assert point["size"] == pytest.approx(requirements.expected("latency", point["widths"]))


def test_a_cut_with_the_measured_profile_keeps_its_budget(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = msgspec.json.decode((place / "profile.json").read_bytes(), type=Profile)
    file, latency = profile.dense.file_bytes // 2, 2 * profile.dense.latency_p95_ms
    budget = ["--budget", f"file={file}B,latency={latency:.3f}ms", "--profile", str(place / "profile.json")]
    capsys.readouterr()
    argv = ["cut", *of_task(place), "--line", "press", "-o", str(place / "out"), "--iterations", "1", *budget]
    assert command.main("kiridashi", "", cut_cli.COMMANDS, [*argv, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["measured"] is None
    assert made["parameters"] < made["parameters_dense"]
    assert made["forecast"]["file_bytes"] <= file
    assert made["forecast"]["latency_p95_ms"] <= latency
    assert next(one["bytes"] for one in made["files"] if one["kind"] == "onnx-fp32") <= file


def test_a_profile_of_another_image_size_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--image-size", "64", "--size", "latency", "--profile", str(place / "profile.json")]
    capsys.readouterr()
    argv = ["front", *of_task(place), *size, "--json"]
    assert command.main("kiridashi", "", front_cli.COMMANDS, argv) == ExitCode.INPUT
    assert "another input size" in json.loads(capsys.readouterr().out)["error"]["what"]
