"""``kiridashi front`` on a small task folder, with the real backbone at a small size."""

import json
from xml.etree import ElementTree

import msgspec
import pytest
from kiridashi import command
from kiridashi.errors import ExitCode
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.store import Bank
from kiridashi_server.budget.requirements import Requirements
from kiridashi_server.cli import bank, front
from kiridashi_server.tasks import Task, save_task_folder
from tiny_science import made_up_profile, make_record, tiny_samples


@pytest.fixture(scope="module")
def profile():
    """A profile of the real backbone at 32 pixels, with made-up prices."""
    backbone = Backbone.load(image_size=32)
    return made_up_profile(
        backbone, device_class="bench", block=16, multiple=16, error={"memory": 0.0, "file": 0.0, "latency": 0.0}
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a task and a bank that knows it."""
    place = tmp_path_factory.mktemp("front")
    splits = {"train": tiny_samples(6, 0), "val": tiny_samples(3, 1), "test": tiny_samples(3, 2)}
    save_task_folder(Task("hues", ("red", "green", "blue"), splits), place / "hues")
    learn = ("bank", "learn", "--task", place / "hues", "--iterations", 1, "--image-size", 32, "--bank", place / "bank")
    assert command.main("kiridashi", "", bank.COMMANDS, [str(part) for part in learn]) == 0
    with Bank.open(place / "bank") as stored:
        stored.add(make_record("foreign", fingerprint="another backbone"))
    return place


def _front(capsys, place, *arguments):
    capsys.readouterr()
    common = ("--task", place / "hues", "--bank", place / "bank", "--image-size", 32, "--per-class", 3, "--points", 6)
    argv = [str(part) for part in ("front", *common, *arguments, "--json")]
    code = command.main("kiridashi", "", front.COMMANDS, argv)
    return code, json.loads(capsys.readouterr().out)


def test_a_front_of_parameters_with_its_picture(capsys, place):
    code, data = _front(capsys, place, "-o", place / "front.svg")
    assert code == 0
    points = data["points"]
    assert [point["size"] for point in points] == [point["parameters"] for point in points]
    assert [point["importance"] for point in points] == sorted(point["importance"] for point in points)
    assert points[-1]["importance"] == pytest.approx(1.0)
    assert all(point["importance"] <= point["bound"] * (1 + 1e-9) for point in points)
    picture = ElementTree.fromstring((place / "front.svg").read_text())
    assert picture.attrib["aria-label"] == "Importance against size"
    assert data["picture"] == str(place / "front.svg")
    assert data["other_backbones"] == 1


def test_a_front_of_latency_keeps_the_profiles_multiple(capsys, place, profile):
    (place / "profile.json").write_bytes(msgspec.json.encode(profile))
    code, data = _front(capsys, place, "--size", "latency", "--profile", place / "profile.json")
    assert code == 0
    requirements = Requirements.of(profile, Backbone.load(image_size=32).quantities)
    for point in data["points"]:
        assert point["size"] == pytest.approx(requirements.forecast(point["widths"]).latency_p95_ms)
    dense = data["points"][-1]["widths"]
    widths = [(dense[name], width) for point in data["points"] for name, width in point["widths"].items()]
    assert all(width % 16 == 0 or width == whole for whole, width in widths)


def test_latency_needs_a_profile(capsys, place):
    code, data = _front(capsys, place, "--size", "latency")
    assert code == ExitCode.INPUT
    assert "--profile" in data["error"]["next"]
