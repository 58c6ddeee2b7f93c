"""The device side from the built wheel, in an environment that holds nothing else: no torch, no onnx, no jax."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from installed import BIN, Plant, environment, write_frames
from tiny_bundle import LABELS, make_bundle, write_device_samples

ROOT = Path(__file__).parents[2]
SOURCES = ("sdk", "device_agent", "server_tools")
ABSENT = ("torch", "onnx", "jax", "PIL", "litert_torch", "sqlalchemy", "scipy")
NEEDED = ("kiridashi", "kiridashi_agent", "onnxruntime", "paho", "tuf")
LOOK = (
    "import importlib.util, json, sys, kiridashi;"
    "print(json.dumps([kiridashi.__file__, [n for n in sys.argv[1:] if importlib.util.find_spec(n)]]))"
)


def run(command: list[object], timeout_s: float, folder: Path) -> str:
    words = [str(word) for word in command]
    env = environment()
    env.pop("PYTHONPATH", None)
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, cwd=folder, env=env, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that neither leftovers of other builds get in nor anything is left in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    run(build, 120, folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of a new environment with ``kiridashi[device]`` from the wheel."""
    folder = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", folder / "env"], 60, folder)
    programs = folder / "env" / "bin"
    run([programs / "python", "-m", "pip", "install", "--quiet", f"kiridashi[device] @ {wheel.as_uri()}"], 240, folder)
    return programs


@pytest.mark.timeout(600)
def test_the_agent_of_a_clean_environment_goes_through_the_whole_loop(clean, tmp_path) -> None:
    where, found = json.loads(run([clean / "python", "-c", LOOK, *ABSENT, *NEEDED], 60, tmp_path))
    assert found == list(NEEDED)
    assert Path(where).is_relative_to(clean.parent)
    assert clean != BIN

    plant = Plant(tmp_path / "plant")
    plant.run("line", "add", "press-3")
    write_device_samples(tmp_path / "samples", per_class=12)
    truth = write_frames(tmp_path / "frames.npy")
    manifest = make_bundle(tmp_path / "bundle")
    with plant.serving():
        device = plant.enrol(agent=clean / "kiridashi-agent")
        device.tune_on(tmp_path / "samples")
        assert device.succeed("doctor")["healthy"]
        plant.publish(tmp_path / "bundle")
        code, line = device.once()
        shown = plant.run("fleet", "show", "cam-1")
    assert (code, line["phase"], line["artifact"], line["tuned"]) == (0, "active", "model.onnx", True), line
    assert line["tune"]["accuracy_after"] > line["tune"]["accuracy_before"]
    assert shown["reported"]["modules_forbidden_loaded"] == []
    assert shown["reported"]["lines"]["press-3"]["model_digest"] == line["model_digest"]

    digest, labels = device.predict(tmp_path / "frames.npy")
    assert digest == line["model_digest"] != manifest.digest
    assert np.mean([label == LABELS[n] for label, n in zip(labels, truth, strict=True)]) > 0.8
    active = device.succeed("undo", "--line", "press-3")["active"]
    assert (active["tuned"], active["model_digest"]) == (False, manifest.digest)


def test_the_server_command_says_what_a_device_does_not_have(clean, tmp_path) -> None:
    command = [clean / "kiridashi", "line", "list", "--state", tmp_path, "--json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'kiridashi[server]'" in json.loads(done.stdout)["error"]["next"]
