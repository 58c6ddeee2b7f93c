"""Trying a bundle's files on this device: probed, compared with the float file, and measured, by child processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from kiridashi.budget import MIB, Measurement, measure_against
from kiridashi.config import LineSection
from kiridashi.errors import BundleError, KiridashiError
from kiridashi.manifest import Artifact, Manifest
from kiridashi.messages import AccuracyCheck, ArtifactTrial

from kiridashi_agent.choice import FLOAT_KINDS, Measured, judged
from kiridashi_agent.jobs import (
    AccuracyRequest,
    MeasureRequest,
    ProbeReport,
    ProbeRequest,
    TuneOutcome,
    TuneRequest,
)
from kiridashi_agent.process import JobCancelledError, Limits

_LOG = logging.getLogger(__name__)
# The kill limit while probing and measuring lies above the budget, or a model a little over it could not be measured.
MEASURE_HEADROOM = 2.0
MEASURE_HEADROOM_BYTES = 128 * MIB


class Jobs(Protocol):
    """The child processes; the module :mod:`kiridashi_agent.jobs` is one."""

    def probe(self, request: ProbeRequest, limits: Limits) -> ProbeReport:
        """Compare a file's outputs on this device with the known ones."""
        ...

    def check_accuracy(self, request: AccuracyRequest, limits: Limits) -> AccuracyCheck:
        """Compare a file's accuracy on this device with the float file's."""
        ...

    def measure(self, request: MeasureRequest, limits: Limits) -> Measurement:
        """Measure what a file needs on this device."""
        ...

    def tune(self, request: TuneRequest, limits: Limits) -> TuneOutcome:
        """Tune a slot's bundle on the device's own samples."""
        ...


class Trial:
    """Tries the files of one bundle folder.

    Args:
        jobs: the child processes.
        state_dir: the device's state folder, where named frames are.
        folder: the slot's folder.
        manifest: the bundle's manifest.
        section: the line's settings.
        limits: time, and the event that ends a job.
    """

    def __init__(
        self, jobs: Jobs, state_dir: Path, folder: Path, manifest: Manifest, section: LineSection, limits: Limits
    ) -> None:
        self._jobs = jobs
        self._state_dir = state_dir
        self._folder = folder
        self._manifest = manifest
        self._section = section
        self._limits = limits
        limit = manifest.budget.memory_bytes
        killed_at = None if limit is None else int(max(limit * MEASURE_HEADROOM, limit + MEASURE_HEADROOM_BYTES))
        self._caged = Limits(limits.seconds, killed_at, limits.cancel)

    def probe(self, artifacts: Sequence[Artifact]) -> tuple[tuple[ArtifactTrial, ...], KiridashiError | None]:
        """What became of each file: those without a reason give the known outputs here, and are accurate enough.

        When none is left, also the error to report: the first file's, or what was lost.

        Raises:
            JobCancelledError: the agent is shutting down.
        """
        trials: list[ArtifactTrial] = []
        failures: list[KiridashiError] = []
        for artifact in artifacts:
            try:
                trials.append(self._gate(artifact))
            except JobCancelledError:
                raise
            except KiridashiError as error:
                _LOG.warning("%s failed its checks: %s", artifact.name, error)
                failures.append(error)
                trials.append(ArtifactTrial(artifact.name, reason=f"failed its checks: {error}"))
        if not all(trial.reason for trial in trials):
            return tuple(trials), None
        inaccurate = BundleError(
            f"no file of line '{self._manifest.line}' version {self._manifest.version} is accurate enough here",
            why="; ".join(f"{trial.artifact}: {trial.reason}" for trial in trials),
            next_step="raise max_accuracy_drop of the line, or publish a bundle with a float file for this device",
        )
        return tuple(trials), failures[0] if failures else inaccurate

    def _gate(self, artifact: Artifact) -> ArtifactTrial:
        section, folder = self._section, str(self._folder)
        self._jobs.probe(ProbeRequest(folder, artifact.name, section.threads, section.providers), self._caged)
        if artifact.kind in FLOAT_KINDS:
            return ArtifactTrial(artifact.name)
        request = AccuracyRequest(
            state_dir=str(self._state_dir),
            line=self._manifest.line,
            folder=folder,
            artifact=artifact.name,
            samples=str(section.samples or ""),
            threads=section.threads,
            providers=section.providers,
            max_drop=section.max_accuracy_drop,
        )
        check = self._jobs.check_accuracy(request, self._limits)
        _LOG.info("%s: %s", artifact.name, check.reason)
        return ArtifactTrial(artifact.name, reason="" if check.passed else check.reason, accuracy=check)

    def measure(self, artifacts: Sequence[Artifact]) -> tuple[list[Measured], dict[str, KiridashiError]]:
        """Every file's measurement and verdict, and by name the errors of those that could not be measured.

        Raises:
            JobCancelledError: the agent is shutting down.
        """
        budget = self._manifest.budget
        measured: list[Measured] = []
        failures: dict[str, KiridashiError] = {}
        for artifact in artifacts:
            request = MeasureRequest(
                str(self._folder), artifact.name, self._section.threads, providers=self._section.providers
            )
            try:
                measurement = measure_against(budget, partial(self._jobs.measure, request, self._caged))
                entry = judged(artifact, budget, measurement)
            except JobCancelledError:
                raise
            except KiridashiError as error:
                _LOG.warning("%s could not be measured: %s", artifact.name, error)
                failures[artifact.name] = error
                continue
            _LOG.info("%s is %s", artifact.name, entry.verdict.describe(budget, entry.measurement))
            measured.append(entry)
        return measured, failures
