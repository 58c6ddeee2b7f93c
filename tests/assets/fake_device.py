"""A device with everything real but the wire and the child processes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from fake_fleet import DirectTransport, FakeFleet
from fake_profile import FakeMeasuring
from kiridashi.budget import MIB, Measurement
from kiridashi.config import BrokerSection, Config, DeviceSection, LimitsSection, LineSection
from kiridashi.messages import AccuracyCheck, LineState, TuneReport
from kiridashi.slots import LineSlots
from kiridashi_agent.actions import Actions
from kiridashi_agent.agent import Agent
from kiridashi_agent.jobs import ProbeReport, TuneOutcome
from kiridashi_agent.journal import Journal
from kiridashi_agent.metadata import TrustStore
from kiridashi_agent.profile_task import ProfileTask
from kiridashi_agent.profile_worker import ProfileWorker
from kiridashi_agent.trust_child import carry_out


class Killed(BaseException):
    """Stands for the end of the process: nothing of the agent catches it."""


@dataclass
class FakeJobs:
    """Child processes that answer by a script; ``before`` runs first and may raise."""

    p95_ms: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 50 * MIB
    kept: bool = False
    fail: dict[str, Exception] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    limits: list = field(default_factory=list)
    drops: dict[str, float] = field(default_factory=dict)
    requests: list = field(default_factory=list)
    before: object = None

    def probe(self, request, limits):
        self._note("probe", request.artifact)
        return ProbeReport(request.artifact, 4, 0.0, 1e-3, 1.0)

    def check_accuracy(self, request, limits):
        self._note("accuracy", request.artifact)
        drop = self.drops.get(request.artifact, 0.0)
        passed = drop <= request.max_drop
        return AccuracyCheck("probe", 8, "model.onnx", drop, request.max_drop, passed, f"{drop:.0%} of the frames lost")

    def measure(self, request, limits):
        self._note("measure", request.artifact)
        self.limits.append(limits)
        self.requests.append(request)
        p95 = self.p95_ms.get(request.artifact, 5.0)
        size = (Path(request.folder) / request.artifact).stat().st_size
        figures = (self.memory_bytes, size, p95, p95, p95, 1.0, 10, "onnxruntime", 1, "real")
        return Measurement(*figures, provider=request.providers[-1])

    def tune(self, request, limits):
        self._note("tune", request.artifact)
        report = TuneReport(10, 1.0, 24, 8, 0.5, 0.6, 0.9, 1.0, 0.1, MIB, self.kept, "better" if self.kept else "worse")
        return TuneOutcome(report, request.artifact, "")

    def _note(self, job: str, artifact: str) -> None:
        self.calls.append((job, artifact))
        if callable(self.before):
            self.before(job)
        for key in (job, f"{job}:{artifact}"):
            if key in self.fail:
                raise self.fail[key]


class Device:
    """One device over one state folder; ``restart`` is a new process on the same folder."""

    def __init__(self, state: Path, fleet: FakeFleet, samples: Path | None = None) -> None:
        self.state, self.fleet = state, fleet
        line = LineSection(samples=samples)
        self.config = Config(
            DeviceSection("cam-1", state),
            BrokerSection("localhost"),
            {"press-3": line},
            LimitsSection(retry_wait_s=0.01, free_disk_mib=0),
        )
        self.jobs = FakeJobs()
        self.runtimes = {"onnxruntime", "litert"}
        self.stop = threading.Event()
        self.measure_probes = FakeMeasuring()
        self.transport = DirectTransport(fleet)
        self.restart()

    def restart(self) -> None:
        self.journal = Journal(self.state / "journal")
        self.trust = TrustStore(self.state / "trust" / "metadata", self.fleet.root, carry_out)
        runtimes = lambda: self.runtimes  # noqa: E731
        actions = Actions(self.config, self.transport, self.trust, self.jobs, self.stop, runtimes)
        self.task = ProfileTask(self.config, self.transport, self.trust, self.journal, self.measure_probes, runtimes)
        profiles = ProfileWorker(self.task)
        self.agent = Agent(self.config, self.transport, self.journal, actions, profiles, self.stop)

    def set_line(self, **fields) -> None:
        """Change the line's settings and start the agent again."""
        line = msgspec.structs.replace(self.config.lines["press-3"], **fields)
        self.config = msgspec.structs.replace(self.config, lines={"press-3": line})
        self.restart()

    def settle(self) -> LineState:
        self.agent.tick(0)
        return self.agent.run_until_settled(timeout_s=20).lines["press-3"]

    @property
    def line(self) -> LineState:
        return self.journal.line("press-3").state

    @property
    def slots(self) -> LineSlots:
        return LineSlots(self.state, "press-3")
