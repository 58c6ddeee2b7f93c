"""Run by an emulated interpreter: what an agent does with a bundle, in child processes, on this processor.

``arm64_smoke.py PYTHON FOLDER``: PYTHON starts children; FOLDER holds the state of a device with a bundle in slot a,
what a server would answer in ``wire.json``, and local samples. Prints one JSON object.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

import msgspec
from kiridashi.artifacts import check_file
from kiridashi.manifest import decode_manifest
from kiridashi.messages import Request
from kiridashi.runtime import available_runtimes
from kiridashi.slots import Active, LineSlots
from kiridashi_agent.jobs import MeasureRequest, ProbeRequest, TuneRequest, measure, probe, tune
from kiridashi_agent.process import Limits
from kiridashi_agent.transport import NotFoundError
from kiridashi_agent.trust_child import FetchOrder, run_in_child

LIMITS = Limits(300.0)


def main(python: str, folder: Path) -> dict:
    sys.executable = python
    wire = json.loads((folder / "wire.json").read_text())

    def ask(request: Request) -> bytes:
        data = wire[request.method].get(request.name)
        if data is None:
            raise NotFoundError(request.name)
        return base64.b64decode(data)

    state = folder / "state"
    order = FetchOrder(str(state / "trust" / "metadata"), base64.b64decode(wire["root"]), wire["wanted"])
    manifest = decode_manifest(run_in_child(order, ask))
    slots = LineSlots(state, manifest.line)
    slot = slots.folder("a")
    for artifact in manifest.artifacts:
        check_file(slot / artifact.name, artifact)
    found: dict = {"machine": os.uname().machine, "runtimes": available_runtimes(), "files": {}}
    for name in ("model.onnx", "model.int8.onnx", "model.tflite"):
        agreed = probe(ProbeRequest(str(slot), name), LIMITS)
        measured = measure(MeasureRequest(str(slot), name, runs=20, max_runs=50, seconds=0.5), LIMITS)
        found["files"][name] = {"probe": msgspec.to_builtins(agreed), "measured": msgspec.to_builtins(measured)}
    request = TuneRequest(str(state), manifest.line, "a", "model.onnx", str(folder / "samples"), "arm", iterations=1)
    outcome = tune(request, LIMITS)
    found["tuned"] = msgspec.to_builtins(outcome.report)
    slots.activate(Active("a", outcome.artifact, outcome.model_digest, tuned=outcome.report.kept))
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
