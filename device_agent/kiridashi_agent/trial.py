"""Trying a bundle's files on this device: each one probed, each one measured, by child processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from kiridashi.budget import MIB, Measurement, measure_against
from kiridashi.errors import KiridashiError
from kiridashi.manifest import Artifact, Manifest

from kiridashi_agent.choice import Measured, judged
from kiridashi_agent.jobs import MeasureRequest, ProbeReport, ProbeRequest, TuneOutcome, TuneRequest
from kiridashi_agent.process import JobCancelledError, Limits

_LOG = logging.getLogger(__name__)
# The kill limit while measuring lies above the budget, or a model a little over it could not be measured.
MEASURE_HEADROOM = 2.0
MEASURE_HEADROOM_BYTES = 128 * MIB


class Jobs(Protocol):
    """The child processes; the module :mod:`kiridashi_agent.jobs` is one."""

    def probe(self, request: ProbeRequest, limits: Limits) -> ProbeReport:
        """Compare a file's outputs on this device with the known ones."""
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
        folder: the slot's folder.
        manifest: the bundle's manifest.
        threads: threads inside one prediction.
        limits: time, and the event that ends a job.
    """

    def __init__(self, jobs: Jobs, folder: Path, manifest: Manifest, threads: int, limits: Limits) -> None:
        self._jobs = jobs
        self._folder = folder
        self._manifest = manifest
        self._threads = threads
        self._limits = limits

    def probe(self, artifacts: Sequence[Artifact]) -> tuple[str, ...]:
        """The names of the files that give the known outputs here.

        Raises:
            KiridashiError: none does; the first one's error.
            JobCancelledError: the agent is shutting down.
        """
        passed: list[str] = []
        failures: list[KiridashiError] = []
        for artifact in artifacts:
            try:
                self._jobs.probe(ProbeRequest(str(self._folder), artifact.name, self._threads), self._limits)
            except JobCancelledError:
                raise
            except KiridashiError as error:
                _LOG.warning("%s failed its probe: %s", artifact.name, error)
                failures.append(error)
            else:
                passed.append(artifact.name)
        if failures and not passed:
            raise failures[0]
        return tuple(passed)

    def measure(self, artifacts: Sequence[Artifact]) -> tuple[list[Measured], list[KiridashiError]]:
        """Every file's measurement and verdict, and the errors of those that could not be measured.

        Raises:
            JobCancelledError: the agent is shutting down.
        """
        budget = self._manifest.budget
        limit = budget.memory_bytes
        killed_at = None if limit is None else int(max(limit * MEASURE_HEADROOM, limit + MEASURE_HEADROOM_BYTES))
        limits = Limits(self._limits.seconds, killed_at, self._limits.cancel)
        measured: list[Measured] = []
        failures: list[KiridashiError] = []
        for artifact in artifacts:
            request = MeasureRequest(str(self._folder), artifact.name, self._threads)
            try:
                measurement = measure_against(budget, partial(self._jobs.measure, request, limits))
                entry = judged(artifact, budget, measurement)
            except JobCancelledError:
                raise
            except KiridashiError as error:
                _LOG.warning("%s could not be measured: %s", artifact.name, error)
                failures.append(error)
                continue
            _LOG.info("%s is %s", artifact.name, entry.verdict.describe(budget, entry.measurement))
            measured.append(entry)
        return measured, failures
