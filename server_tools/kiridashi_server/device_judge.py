"""A device of the fleet as the judge of a cut: its profile, and measurements of candidates made on it.

A candidate travels as a probe set of one graph, by the same way and under the same signatures as a profile's. Every
measurement is one request. Requests and answers lie in the registry, so a run that was interrupted finds again what it
asked for, and what came meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from kiridashi.artifacts import describe_file, write_atomic
from kiridashi.budget import Measurement
from kiridashi.errors import InputError
from kiridashi.manifest import RuntimeName
from kiridashi.probes import PROBE_SET_NAME, ProbeGraph, ProbeReport, ProbeSet

from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.device import DeviceError
from kiridashi_server.budget.probes import KINDS
from kiridashi_server.budget.profile import Profile, fit_profile
from kiridashi_server.fleet.database import stamp
from kiridashi_server.fleet.profiling import Standing, forget_candidate, request_profile, standing
from kiridashi_server.fleet.records import Device, ProfileRequest
from kiridashi_server.fleet.records import Profile as StoredProfile
from kiridashi_server.fleet.server import PlantServer

_KEPT_FOR = timedelta(days=1)
"""An answer is found again for as long: a device does not stay for ever what it was."""
_PREFERRED: RuntimeName = "onnxruntime"


@dataclass
class DeviceJudge:
    """Measures model files on a device of the fleet; call it with files (:data:`kiridashi_server.pipeline.Measure`).

    Attributes:
        server: the plant's state; another process serves it.
        device: who measures.
        probes: the probe set of the device's profile: of which backbone and for which runtime the files are.
        threads: inside one prediction, those of the profile.
        timeout_s: how long one measurement is waited for.
        seconds: what the device may take for it: three starts of a process, and some seconds of predicting.
        say: gets a line whenever the request has moved on.
        pause_s: between two looks at the registry.
    """

    server: PlantServer
    device: str
    probes: ProbeSet
    threads: int = 1
    timeout_s: float = 600.0
    seconds: float = 30.0
    say: Callable[[str], None] = lambda _text: None
    pause_s: float = 0.5
    _used: dict[str, int] = field(default_factory=dict, init=False)

    def __call__(self, files: Sequence[Path]) -> tuple[Measurement, ...]:
        """Have the files measured one by one. Each file's folder gets the probe set that it travels in.

        Measuring the same file again is a new request, unless an interrupted run has the answer already.

        Raises:
            DeviceError: the device failed, or nothing came in time; it says what was heard of the device last.
        """
        return tuple(self._measure(file) for file in files)

    def forget(self) -> None:
        """Drop the answers that were used: a finished run's are not found again by the next."""
        for digest in self._used:
            forget_candidate(self.server.registry, self.server.repository, self.device, digest, datetime.now(UTC))

    def _measure(self, file: Path) -> Measurement:
        candidate = candidate_set(self.probes, file)
        write_atomic(file.parent / PROBE_SET_NAME, candidate.encode())
        digest = self.server.publish_probes(file.parent, is_candidate=True).digest
        before = self._used.setdefault(digest, 0)
        report = self._answer(digest, before) or self._wait(digest, before)
        self._used[digest] = before + 1
        return to_measurement(report, file.stat().st_size)

    def _answer(self, digest: str, before: int) -> ProbeReport | None:
        since = datetime.now(UTC) - _KEPT_FOR
        answers = self.server.registry.profiles.answers(self.device, digest, self.threads, since)
        return answers[before] if len(answers) > before else None

    def _wait(self, digest: str, before: int) -> ProbeReport:
        """Ask once nothing else is asked of the device, and wait for the answer."""
        deadline = time.monotonic() + self.timeout_s
        number, said = 0, ""
        while (report := self._answer(digest, before)) is None:
            request, device = self._look()
            state = standing(request, device) if request else None
            is_own = request is not None and request.number == number
            if is_own and state is not None and state.phase == "failed":
                raise DeviceError(
                    f"device '{self.device}' could not measure the cut",
                    why=state.error,
                    next_step="remove the cause, then run the same command again",
                )
            waits = state is not None and request is not None and state.phase not in ("answered", "failed")
            if not is_own and (request is None or not waits or request.probes == digest):
                number = self._ask(digest)
                continue
            if time.monotonic() >= deadline:
                raise self._nothing_came(device, state, is_own=is_own)
            text = f"{self.device}: {'' if is_own else 'another request first: '}{state or 'asked'}"
            if text != said:
                said = text
                self.say(text)
            time.sleep(self.pause_s)
        return report

    def _look(self) -> tuple[ProfileRequest | None, Device]:
        registry = self.server.registry
        return registry.profiles.request_of(self.device), known_device(self.server, self.device)

    def _ask(self, digest: str) -> int:
        """The number of the request; one that the device works on already stays."""
        now = datetime.now(UTC)
        wanted = ProfileRequest("", 0, digest, self.seconds, self.threads, stamp(now))
        registry = self.server.registry
        request_profile(registry, self.server.repository.published, [self.device], wanted, now)
        asked = registry.profiles.request_of(self.device)
        return asked.number if asked else 0

    def _nothing_came(self, device: Device, state: Standing | None, *, is_own: bool) -> DeviceError:
        reach = {None: "it was never online", True: "it is online", False: "it is offline"}[device.online]
        heard = f"last heard of {device.reported_at}" if device.reported_at else "nothing was ever heard of it"
        what = "the request for the cut" if is_own else "an earlier request, which goes first,"
        return DeviceError(
            f"device '{self.device}' has not measured the cut within {self.timeout_s:g} s",
            why=f"{reach}, {heard}; {what} stands at: {state or 'asked'}",
            next_step="see that kiridashi serve runs and the device is online, "
            "then run the same command again: it goes on where it stopped",
        )


def candidate_set(probes: ProbeSet, file: Path) -> ProbeSet:
    """A probe set of one file, a cut of the same backbone for the same runtime; the same file gives the same digest."""
    artifact = describe_file(file, KINDS[probes.runtime])
    graph = ProbeGraph(artifact, "cut", widths={})
    return msgspec.structs.replace(probes, name=f"candidate-{artifact.sha256[:12]}", graphs=(graph,))


def to_measurement(report: ProbeReport, file_bytes: int) -> Measurement:
    """What a report says of its only graph. Pure.

    The 99th percentile is 0, and the notes say so, where the device's agent does not tell it.
    """
    (timing,) = report.timings
    untold = () if timing.p99_ms else ("the device's agent does not tell the 99th percentile",)
    return Measurement(
        memory_bytes=timing.memory_bytes,
        file_bytes=file_bytes,
        latency_p50_ms=timing.p50_ms,
        latency_p95_ms=timing.p95_ms,
        latency_p99_ms=timing.p99_ms,
        load_ms=timing.load_ms,
        runs=timing.alone_runs or timing.runs,
        runtime=report.runtime,
        threads=report.threads,
        hardware=report.hardware,
        notes=(*report.notes, *untold),
        quiet_ms=timing.quiet_ms,
    )


def known_device(server: PlantServer, name: str) -> Device:
    """A device of the plant.

    Raises:
        InputError: there is none of that name.
    """
    device = server.registry.device(name)
    if device is None:
        raise InputError(f"there is no device '{name}'", next_step="kiridashi fleet list")
    return device


def profile_of(
    server: PlantServer, device: str, backbone: Backbone, runtime: str | None = None, threads: int | None = None
) -> tuple[ProbeSet, Profile]:
    """The newest complete profile of a device's class for a backbone and its input size, fitted, and its probe set.

    Args:
        server: the plant's state.
        device: which one's class; the class is the one that it reported last.
        backbone: what is cut.
        runtime: which one it is to be; by default onnxruntime, else the only one.
        threads: inside one prediction; by default the fewest that there is a profile of.

    Raises:
        InputError: no such device, one that never reported a profile, or none that fits.
    """
    known_device(server, device)
    device_class = server.registry.profiles.class_of(device)
    if device_class is None:
        raise _no_profile(f"device '{device}' has never reported a profile", "so its class is not known", device)
    stored = [one for one in server.profiles(device_class) if one.report.complete]
    known = [(server.probe_set(one.report.probes), one) for one in stored]
    usable = [(probes, one) for probes, one in known if _is_of(probes, backbone)]
    runtimes = {probes.runtime for probes, _ in usable}
    wanted = runtime or (_PREFERRED if _PREFERRED in runtimes else next(iter(runtimes), _PREFERRED))
    fitting = [pair for pair in usable if pair[1].runtime == wanted and threads in (None, pair[1].threads)]
    if not fitting:
        _, height, width = backbone.input_size
        there = "; ".join(f"{one.probe_set}, {one.threads} thread(s)" for one in stored)
        asked = f" and {threads} thread(s)" if threads else ""
        raise _no_profile(
            f"the class of device '{device}' has no profile for {backbone.name}, {height} x {width} pixels, "
            f"{wanted}{asked}",
            f"'{device_class}' has: {there or 'no complete one'}",
            device,
        )
    probes, found = min(fitting, key=_fewest_threads_then_newest)
    return probes, fit_profile(probes, found.report, backbone.quantities)


def _fewest_threads_then_newest(pair: tuple[ProbeSet, StoredProfile]) -> tuple[int, float]:
    _, stored = pair
    return stored.threads, -datetime.fromisoformat(stored.measured).timestamp()


def _is_of(probes: ProbeSet, backbone: Backbone) -> bool:
    same_size = (probes.height, probes.width) == backbone.input_size[1:]
    return same_size and probes.backbone_fingerprint == backbone.fingerprint


def _no_profile(what: str, why: str, device: str) -> InputError:
    return InputError(
        what,
        why=why,
        next_step=f"kiridashi profile publish DIR, then kiridashi profile request --device {device}",
    )
