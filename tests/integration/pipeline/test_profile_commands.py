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
from kiridashi_server.cli import profile as profile_cli

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


def test_measured_by_the_agent_and_fitted(probes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, output = tmp_path / "report.json", tmp_path / "profile.json"
    agent = [str(Path(sys.executable).with_name("kiridashi-agent")), "measure", "--profile", str(probes)]
    subprocess.run([*agent, "-o", str(report), "--seconds", "40"], check=True, capture_output=True)
    fit = ["profile", "fit", str(report), "--probes", str(probes), "-o", str(output), "--image-size", "32", "--json"]
    capsys.readouterr()
    assert command.main("kiridashi", "", profile_cli.COMMANDS, fit) == 0
    profile = msgspec.json.decode(output.read_bytes(), type=Profile)
    assert json.loads(capsys.readouterr().out)["multiple"] == profile.multiple
    assert len(profile.points) == CUTS + 3
    assert profile.dense.quiet_ms == max(point.quiet_ms for point in profile.points if not point.multiple)
    assert profile.multiple in (2, 4, 8, 16, 32)
    assert profile.tail >= 1
    wrong = [*fit[:-3], "--image-size", "64", "--json"]
    assert command.main("kiridashi", "", profile_cli.COMMANDS, wrong) == ExitCode.INPUT
    assert "32 x 32 pixels" in json.loads(capsys.readouterr().out)["error"]["what"]
