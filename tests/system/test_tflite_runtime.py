"""tflite-runtime 2.14 with numpy 1, in an environment of its own: ``pip install 'kiridashi[tflite-legacy]'``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dynamic_tflite import write_dynamic
from installed import environment
from kiridashi.preprocess import softmax
from kiridashi.slots import Active, LineSlots
from tiny_bundle import make_bundle

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from kiridashi import LineModel
from kiridashi.errors import BundleError
from kiridashi.runtime import open_file
state, dynamic, frames = sys.argv[1:]
with LineModel.open("press-3", state) as model:
    info, values = model.info(), model.predict(np.load(frames)).values
try:
    open_file(Path(dynamic))
    refused = ""
except BundleError as error:
    refused = str(error)
print(json.dumps([np.__version__, info.runtime, info.provider, values.tolist(), refused]))
"""


def run(command: list[object], timeout_s: float, folder: Path) -> str:
    env = environment()
    env.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, cwd=folder, env=env, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="tflite-runtime 2.14 has no wheel for newer Pythons")
@pytest.mark.timeout(400)
def test_a_line_on_tflite_runtime(tmp_path: Path) -> None:
    for name in ("sdk", "device_agent", "server_tools"):
        shutil.copytree(
            ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path / "source"],
        120,
        tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    run([sys.executable, "-m", "venv", tmp_path / "env"], 60, tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", f"kiridashi[tflite-legacy] @ {wheel.as_uri()}"], 200, tmp_path)

    slots = LineSlots(tmp_path / "state", "press-3")
    folder = slots.prepare("a")
    manifest = make_bundle(folder)
    slots.activate(Active(slot="a", artifact="model.tflite", model_digest=manifest.digest))
    write_dynamic(folder / "model.tflite", tmp_path / "dynamic.tflite")
    with np.load(folder / "probe.npz") as probe:
        np.save(tmp_path / "frames.npy", probe["images"])
        expected = softmax(probe["logits.model.tflite"])

    said = run(
        [python, "-c", SCRIPT, slots.root.parent.parent, tmp_path / "dynamic.tflite", tmp_path / "frames.npy"],
        60,
        tmp_path,
    )
    numpy_version, runtime, provider, values, refused = json.loads(said.splitlines()[-1])
    assert numpy_version.startswith("1.")
    assert (runtime, provider) == ("tflite-runtime 2.14.0", "xnnpack")
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert "quantised dynamically" in refused
    told = run(
        [python.with_name("kiridashi-line"), "info", "--line", "press-3", "--state", tmp_path / "state"], 60, tmp_path
    )
    assert "tflite-runtime 2.14.0" in told
