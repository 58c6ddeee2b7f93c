"""A probe set of noise, and measuring that takes no processor: by the contract of ``measure_probes``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from kiridashi.artifacts import describe_file
from kiridashi.probes import PROBE_SET_NAME, ProbeGraph, ProbeReport, ProbeSet, Timing, decode_probe_set
from kiridashi_agent.process import JobCancelledError

DEVICE_CLASS = "Test Board 1, 4 cores"


def make_probes(folder: Path, graphs: int = 3, size: int = 300_000, name: str = "tiny-onnxruntime") -> ProbeSet:
    """A probe set whose files are noise; the first is the dense model."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for n in range(graphs):
        path = folder / f"probe-{n:03d}.onnx"
        path.write_bytes(random.Random(n).randbytes(size + n))
        made.append(ProbeGraph(describe_file(path, "onnx-fp32"), "cut", {"block.0": 8 * (n + 1)}))
    probes = ProbeSet(
        name=name,
        backbone="tiny",
        backbone_fingerprint="f" * 64,
        layout_digest="e" * 64,
        height=32,
        width=32,
        runtime="onnxruntime",
        graphs=tuple(made),
    )
    (folder / PROBE_SET_NAME).write_bytes(probes.encode())
    return probes


def timing(name: str, ms: float = 2.0) -> Timing:
    return Timing(name, ms, (ms, ms * 1.01), 3.0, 200, ms * 1.1, ms * 1.3, 50_000_000, 4.0)


def report_of(probes: ProbeSet, names: list[str] | None = None, threads: int = 1) -> ProbeReport:
    """A report over the named graphs, or all."""
    every = [graph.artifact.name for graph in probes.graphs]
    chosen = every if names is None else names
    return ProbeReport(
        probes=probes.digest,
        device_class=DEVICE_CLASS,
        runtime="onnxruntime 1.20.1",
        threads=threads,
        hardware="real",
        timings=tuple(timing(name) for name in chosen),
        seconds=1.0,
        complete=set(chosen) == set(every),
    )


@dataclass
class FakeMeasuring:
    """Measures one graph after the other, each noted in the record; ``before`` runs first and may raise.

    ``pause_s`` is spent on a graph; ``raises`` tells how a cancelled measurement ends: by the error, or by a report.
    """

    pause_s: float = 0.0
    raises: bool = True
    seconds_over_after: int | None = None
    before: Callable[[str], None] | None = None
    starts: int = 0
    measured: list[str] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __call__(self, folder, record, settings, *, cancel=None, tell=None) -> ProbeReport:
        self.starts += 1
        self.seconds.append(settings.seconds)
        self.threads.append(threading.current_thread().name)
        probes = decode_probe_set((folder / PROBE_SET_NAME).read_bytes())
        done = msgspec.json.decode(record.read_bytes(), type=list[str]) if record.exists() else []
        for graph in probes.graphs:
            name = graph.artifact.name
            if name in done:
                continue
            if self.seconds_over_after is not None and len(done) >= self.seconds_over_after:
                break
            if self.before is not None:
                self.before(name)
            assert (folder / name).stat().st_size == graph.artifact.bytes
            deadline = time.monotonic() + self.pause_s
            while time.monotonic() < deadline and not (cancel and cancel.is_set()):
                time.sleep(0.005)
            if cancel is not None and cancel.is_set():
                if self.raises:
                    raise JobCancelledError("measuring was stopped")
                break
            done.append(name)
            self.measured.append(name)
            record.write_bytes(msgspec.json.encode(done))
            if tell is not None:
                tell(len(done), len(probes.graphs))
        report = report_of(probes, done, settings.threads)
        return msgspec.structs.replace(report, device_class=settings.device_class or DEVICE_CLASS)
