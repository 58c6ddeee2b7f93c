"""Profiles over the fleet: offering a probe set, asking devices to measure it, and taking their reports.

A report is data from a device, so it is checked before it is kept: a cut for a whole class of devices is decided by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kiridashi.artifacts import check_file
from kiridashi.errors import BundleError, InputError, StateError
from kiridashi.messages import probes_path
from kiridashi.probes import (
    MAX_SECONDS,
    PROBE_SET_NAME,
    ProbeReport,
    ProbeSet,
    Timing,
    check_limits,
    decode_probe_report,
    decode_probe_set,
)

from kiridashi_server.fleet.database import stamp
from kiridashi_server.fleet.published import Published
from kiridashi_server.fleet.records import Device, ProfileRequest, PublishedProbes
from kiridashi_server.fleet.registry import Registry
from kiridashi_server.fleet.repository import Repository
from kiridashi_server.fleet.store import BlobStore

MAX_CLASS_LENGTH = 200
MAX_NAME_LENGTH = 160


@dataclass(frozen=True)
class Standing:
    """Where a request stands: ``answered``, ``asked`` (the device has said nothing yet), or the device's own phase.

    ``done`` of ``total`` steps is how far measuring has come; ``error`` is why it does not go on, if it does not.
    """

    phase: str
    done: int = 0
    total: int = 0
    error: str = ""

    def __str__(self) -> str:
        steps = f", {self.done} of {self.total} steps" if self.phase == "measuring" else ""
        return self.phase + steps + (f": {self.error}" if self.error else "")


def standing(request: ProfileRequest, device: Device) -> Standing:
    """Where a request stands: what the device says of it, as far as it has heard of it. Pure."""
    if request.answered is not None:
        return Standing("answered")
    state = device.reported.probes if device.reported else None
    if state is None or state.request != request.number:
        too_old = device.reported is not None and device.reported.protocol == "1.0"
        why = "its agent is too old to measure profiles: update kiridashi there" if too_old else ""
        return Standing("asked", error=why)
    return Standing(state.phase, state.done, state.total, state.error.message if state.error else "")


def publish_probes(
    folder: Path,
    repository: Repository,
    store: BlobStore,
    registry: Registry,
    now: datetime,
    *,
    is_candidate: bool = False,
) -> PublishedProbes:
    """Check a probe set whole, store its files, and sign it. Publishing it again is fine.

    What is measured of a candidate is kept apart from the profiles; see :meth:`ProfileBook.add_probes`.

    Raises:
        BundleError: no probe set, one that is not in canonical form, or a file that is missing or changed.
        InputError: it is larger than a device accepts.
    """
    path = folder / PROBE_SET_NAME
    if not path.is_file():
        raise BundleError(f"{folder} is not a probe set", why=f"it has no {PROBE_SET_NAME}")
    data = path.read_bytes()
    probes = decode_probe_set(data, str(path))
    if data != probes.encode():
        raise BundleError(
            f"{path} is not in canonical form",
            why="it was edited, or written by another program; its digest would not be the probe set's",
            next_step="make the probe set again",
        )
    if not 0 < len(probes.name) <= MAX_NAME_LENGTH or not probes.name.isprintable():
        raise InputError(f"{path} has a name that is empty, too long or cannot be printed")
    check_limits(probes, MAX_SECONDS, threads=1)
    artifacts = [graph.artifact for graph in probes.graphs]
    for artifact in artifacts:
        check_file(folder / artifact.name, artifact)
    for artifact in artifacts:
        store.add(folder / artifact.name, artifact.sha256)
    repository.publish_probes(data, now)
    entry = PublishedProbes(
        digest=probes.digest,
        name=probes.name,
        backbone_fingerprint=probes.backbone_fingerprint,
        runtime=probes.runtime,
        graphs=len(artifacts),
        bytes=sum(artifact.bytes for artifact in artifacts),
        published=stamp(now),
    )
    blobs = [artifact.sha256 for artifact in artifacts]
    return registry.profiles.add_probes(entry, blobs, is_candidate=is_candidate)


def find_probes(registry: Registry, name: str | None) -> PublishedProbes:
    """A published probe set by its name (the newest of that name) or the beginning of its digest; else the newest.

    Raises:
        InputError: there is none.
    """
    known = registry.profiles.probe_sets()
    fitting = [entry for entry in known if name is None or entry.name == name or entry.digest.startswith(name)]
    if not fitting:
        raise InputError(
            f"there is no probe set '{name}'" if name else "no probe set is published",
            why=f"published: {', '.join(sorted({entry.name for entry in known})) or 'none'}",
            next_step="kiridashi profile publish DIR",
        )
    return fitting[-1]


def read_probes(published: Published, digest: str) -> ProbeSet:
    """A published probe set.

    Raises:
        StateError: the repository does not have it.
    """
    path = probes_path(digest)
    data = published.read_target(path)
    if data is None:
        raise StateError(f"the repository has no {path}", next_step="kiridashi profile publish DIR")
    return decode_probe_set(data, path)


def request_profile(
    registry: Registry,
    published: Published,
    devices: Sequence[str],
    wanted: ProfileRequest,
    now: datetime,
) -> int:
    """Ask devices to measure a published probe set; returns how many were asked anew. See :meth:`ProfileBook.ask`.

    Raises:
        InputError: no device or an unknown one, or more seconds or threads than a device accepts.
    """
    if not devices:
        raise InputError("no device is asked", next_step="name a device, or a line that has some (kiridashi line list)")
    check_limits(read_probes(published, wanted.probes), wanted.seconds, wanted.threads)
    return registry.profiles.ask(list(dict.fromkeys(devices)), wanted, now)


def forget_candidate(registry: Registry, repository: Repository, device: str, digest: str, now: datetime) -> None:
    """Drop what a device reported of a candidate, and the candidate's signature when nobody is to measure it."""
    registry.profiles.forget(device, digest)
    if not any(request.probes == digest and request.answered is None for request in registry.profiles.requests()):
        repository.withdraw_probes(digest, now)


class ReportDesk:
    """Takes devices' reports."""

    def __init__(self, registry: Registry, published: Published, now: Callable[[], datetime]) -> None:
        self._registry = registry
        self._published = published
        self._now = now

    def take_report(self, device: str, number: int, data: bytes) -> None:
        """Keep the report that answers request ``number``; taking it again is fine, the first one counts.

        Raises:
            InputError: the device was not asked for this, or the report cannot be true; it says why.
        """
        request = self._registry.profiles.request_of(device)
        if request is None or request.number != number:
            raise InputError(f"device '{device}' was not asked for profile {number}")
        if request.answered is not None:
            return
        report = decode_probe_report(data, f"the report of device '{device}'")
        if report.probes != request.probes:
            raise InputError(f"device '{device}' measured another probe set than it was asked for")
        probes = read_probes(self._published, request.probes)
        check_report(report, probes, request.threads)
        self._registry.profiles.add(request, report, probes.runtime, probes.backbone_fingerprint, self._now())


def check_report(report: ProbeReport, probes: ProbeSet, threads: int) -> None:
    """Refuse a report that does not fit its probe set, or that no measurement can give. Pure.

    Raises:
        InputError: with the first thing that is wrong.
    """
    known = {graph.artifact.name for graph in probes.graphs}
    names = [timing.name for timing in report.timings]
    wrong = [timing.name for timing in report.timings if not _is_possible(timing)]
    findings = (
        (not names, "nothing was measured"),
        (not set(names) <= known, "it has graphs that the probe set does not have"),
        (len(set(names)) != len(names), "it has a graph twice"),
        (report.complete and set(names) != known, "it says that it is complete, and is not"),
        (report.threads != threads, f"it was measured with {report.threads} threads instead of {threads}"),
        (not 0 < len(report.device_class) <= MAX_CLASS_LENGTH, "its device class is empty or too long"),
        (not report.device_class.isprintable(), "its device class cannot be printed"),
        (not _is_positive(report.seconds), "its seconds are not a positive number"),
        (bool(wrong), f"a number of '{(wrong or [''])[0]}' is not positive and finite"),
    )
    for is_wrong, why in findings:
        if is_wrong:
            raise InputError("the report was refused", why=why, next_step="ask for the profile again")


def _is_possible(timing: Timing) -> bool:
    times_ms = (timing.quiet_ms, *timing.halves_ms, timing.anchor_ms, timing.p50_ms, timing.p95_ms, timing.load_ms)
    optional = (timing.p99_ms, timing.alone_runs)
    told = all(value >= 0 and math.isfinite(value) for value in optional)
    return told and all(map(_is_positive, times_ms)) and timing.runs > 0 and timing.memory_bytes > 0


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
