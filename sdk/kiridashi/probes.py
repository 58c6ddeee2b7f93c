"""Probes: model files that a device measures so that the server can tell beforehand what any cut will need there.

The server makes a :class:`ProbeSet`, the device's agent measures it and answers with a :class:`ProbeReport`. Both are
data; neither side needs the other's libraries.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from kiridashi.errors import BundleError, InputError
from kiridashi.manifest import MAX_MANIFEST_BYTES, Artifact, RuntimeName, check_artifacts

FORMAT = "kiridashi-probes/1"
REPORT_FORMAT = "kiridashi-probe-report/1"
PROBE_SET_NAME = "probes.json"
MAX_GRAPHS = 128
MAX_BYTES = 1024**3
MAX_SECONDS = 6 * 3600.0
MAX_THREADS = 64

ProbeRole = Literal["cut", "multiple"]
"""``cut``: a whole cut with random widths, from which the models are fitted. ``multiple``: a whole cut whose widths
are odd multiples of a number, from which the channel multiple is found."""


class ProbeGraph(msgspec.Struct, frozen=True):
    """One model file of a probe set.

    Attributes:
        artifact: the file, with the digests of its chunks.
        role: what it is measured for.
        widths: units kept by group of the backbone's layout.
        multiple: of a ``multiple`` probe, the number that its widths are odd multiples of; else 0.
    """

    artifact: Artifact
    role: ProbeRole
    widths: dict[str, int]
    multiple: int = 0


class ProbeSet(msgspec.Struct, frozen=True, kw_only=True):
    """What a device is asked to measure. The first graph is the dense model: every other time is compared with its.

    Attributes:
        name: for people and paths: ``efficientnet-lite0-64-onnxruntime``.
        backbone, backbone_fingerprint, layout_digest: what the graphs are cuts of.
        height, width: of the input, pixels.
        runtime: which runs all the graphs.
        graphs: at least one; file names are unique.
    """

    format: str = FORMAT
    name: str
    backbone: str
    backbone_fingerprint: str
    layout_digest: str
    height: int
    width: int
    runtime: RuntimeName
    graphs: tuple[ProbeGraph, ...]

    def encode(self) -> bytes:
        """The canonical bytes."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hex."""
        return hashlib.sha256(self.encode()).hexdigest()


class Timing(msgspec.Struct, frozen=True):
    """What one graph was measured to need.

    Attributes:
        name: the artifact's.
        quiet_ms: time of one prediction in steady serving without disturbance, preprocessing and softmax included,
            from runs that are interleaved with those of other graphs. It is processor time with one thread, else wall
            time.
        halves_ms: the same from the first and from the second half of the runs, each in a process of its own; how far
            they are apart is the measurement's noise. A common factor of all graphs is the device's speed that moved.
        anchor_ms: quiet time of the dense model in the same rounds. The largest model is also the one that other
            work disturbs most: it shows that the device was busy, it is no unit to divide by.
        runs: predictions that were timed.
        p50_ms, p95_ms: wall time of single predictions in a process that runs this graph only.
        memory_bytes: that process's peak resident set.
        load_ms: loading the model in it.
        p99_ms, alone_runs: 99th percentile of the same predictions and how many there were; 0 from an agent that does
            not tell.
    """

    name: str
    quiet_ms: float
    halves_ms: tuple[float, float]
    anchor_ms: float
    runs: int
    p50_ms: float
    p95_ms: float
    memory_bytes: int
    load_ms: float
    p99_ms: float = 0.0
    alone_runs: int = 0


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a device measured of a probe set.

    Attributes:
        probes: digest of the probe set.
        device_class: devices of one class are taken to be alike: processor, cores, and the board's name if it has one.
        runtime: library and version.
        threads: inside one prediction.
        hardware: whether the processor is real.
        timings: one for each graph that was measured; without all of them the report is not ``complete``.
        seconds: spent on measuring, all starts together.
        notes: what may have disturbed it.
    """

    format: str = REPORT_FORMAT
    probes: str
    device_class: str
    runtime: str
    threads: int
    hardware: Literal["real", "emulated"]
    timings: tuple[Timing, ...]
    seconds: float
    complete: bool
    notes: tuple[str, ...] = ()


def decode_probe_set(data: bytes, source: str = PROBE_SET_NAME) -> ProbeSet:
    """Read and check a probe set.

    Raises:
        BundleError: too large, no probe set, another format, no graphs, unsafe or repeated file names, files that the
            set's runtime does not run, or a chunk list that does not add up.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{source} is larger than {MAX_MANIFEST_BYTES} bytes", why="no real probe set is that large")
    try:
        probes = msgspec.json.decode(data, type=ProbeSet)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{source} is not a probe set", why=str(error)) from error
    if probes.format != FORMAT:
        raise BundleError(
            f"{source} has the format {probes.format!r}, this program reads {FORMAT}",
            next_step="update the older side",
        )
    if not probes.graphs:
        raise BundleError(f"{source} has no graphs")
    artifacts = tuple(graph.artifact for graph in probes.graphs)
    check_artifacts(artifacts, source)
    strange = [artifact.name for artifact in artifacts if artifact.runtime != probes.runtime]
    if strange:
        raise BundleError(f"{source} is for {probes.runtime}, which does not run {', '.join(strange)}")
    return probes


def decode_probe_report(data: bytes, source: str = "the report") -> ProbeReport:
    """Read a device's report.

    Raises:
        InputError: too large, no report, or of another format.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise InputError(f"{source} is larger than {MAX_MANIFEST_BYTES} bytes", why="no real report is that large")
    try:
        report = msgspec.json.decode(data, type=ProbeReport)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is no report of measured probes", why=str(error)) from error
    if report.format != REPORT_FORMAT:
        raise InputError(
            f"{source} has the format {report.format!r}, this program reads {REPORT_FORMAT}",
            next_step="update the older side",
        )
    return report


def check_limits(probes: ProbeSet, seconds: float, threads: int) -> None:
    """Refuse a request to measure that would keep a device busy for too long, or fill its disk.

    Both sides ask: the server before it asks a device, and the device, whoever asks.

    Raises:
        InputError: more graphs, bytes, seconds or threads than the limits, or less than nothing.
    """
    size = sum(graph.artifact.bytes for graph in probes.graphs)
    for what, value, limit in (
        ("graphs", len(probes.graphs), MAX_GRAPHS),
        ("bytes", size, MAX_BYTES),
        ("seconds", seconds, MAX_SECONDS),
        ("threads", threads, MAX_THREADS),
    ):
        if not 0 < value <= limit:
            raise InputError(
                f"measuring '{probes.name}' with {value:g} {what} was refused",
                why=f"a profile is measured with more than 0 and at most {limit:g} {what}",
                next_step="ask for less, or make a smaller probe set",
            )
