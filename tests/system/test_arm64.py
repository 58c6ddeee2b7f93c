"""The agent on arm64, under emulation: a signed bundle verified, probed, measured and tuned, in both runtimes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_fleet import FakeFleet
from tiny_bundle import make_bundle, write_device_samples

SCRIPT = Path(__file__).parents[2] / "scripts" / "arm64_smoke.sh"
UNREACHABLE = 75
KEPT = "KIRIDASHI_ARM64_FOLDER"


@pytest.mark.timeout(900)
def test_the_agent_on_arm64(tmp_path: Path) -> None:
    if not (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")):
        pytest.skip("no emulator for arm64 here (apt-get install qemu-user-static)")
    if not shutil.which("apt-get"):
        pytest.skip("the arm64 userland comes from Debian's packages, and there is no apt-get here")
    folder = Path(os.environ.get(KEPT) or tmp_path / "arm64")
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    manifest = write_wire(folder / "bundle")
    done = subprocess.run(
        [str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.returncode == UNREACHABLE:
        pytest.skip(f"the arm64 packages cannot be fetched: {done.stderr.splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["machine"] == "aarch64"
    assert set(found["runtimes"]) == {"onnxruntime", "litert"}
    assert set(found["files"]) == {entry.name for entry in manifest.artifacts if entry.runtime}
    for name, file in found["files"].items():
        assert file["probe"]["max_abs_diff"] <= file["probe"]["tolerance"], name
        assert file["measured"]["hardware"] == "emulated"
        assert file["measured"]["latency_p95_ms"] > 0
    assert (found["tuned"]["iterations"], found["tuned"]["kept"]) == (1, True), found["tuned"]


def write_wire(folder: Path):
    """A bundle in slot a of a device, its metadata as the server would answer, and samples; the manifest."""
    slot = folder / "state" / "lines" / "press-3" / "a"
    manifest, fleet = make_bundle(slot), FakeFleet()
    target = fleet.publish(slot, manifest)
    write_device_samples(folder / "samples", per_class=12)
    encoded = {
        method: {name: base64.b64encode(data).decode() for name, data in files.items()}
        for method, files in (("metadata", fleet.metadata), ("target", fleet.targets))
    }
    wire = {**encoded, "root": base64.b64encode(fleet.root).decode(), "wanted": target}
    (folder / "wire.json").write_text(json.dumps(wire))
    return manifest
