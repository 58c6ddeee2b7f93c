"""Tuning the model that serves, on demand: on the bench, judged, sealed, and only then moved to where it can serve.

Every phase is journaled before its action, under the line's lock. Killed on the bench, nothing has changed; killed
while activating, the next start finishes it. The model that serves goes on until the pointer is replaced.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.budget import MIB, Measurement
from kiridashi.config import Config
from kiridashi.errors import BudgetError, BundleError, KiridashiError, StateError
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi.messages import ErrorReport
from kiridashi.runtime import installed_runtimes
from kiridashi.slots import BENCH, TUNED_NAME, Active, LineSlots
from kiridashi.spool import AnswerLog, SpoolFolder

from kiridashi_agent.actions import with_active
from kiridashi_agent.choice import needed_files
from kiridashi_agent.download import check_room
from kiridashi_agent.jobs import Survey, TuneOutcome, TuneRequest
from kiridashi_agent.journal import Journal, TuneRecord
from kiridashi_agent.lifecycle import RESTING
from kiridashi_agent.locks import MakesWay
from kiridashi_agent.machine import hottest_celsius
from kiridashi_agent.metadata import TrustStore
from kiridashi_agent.process import JobCancelledError, Limits
from kiridashi_agent.trial import Jobs, Trial
from kiridashi_agent.tune_terms import in_words, obstacle, tune_limits, tune_request

_LOG = logging.getLogger(__name__)
_REMEMBERED_ANSWERS = 8
_replace = msgspec.structs.replace


class TooHotError(StateError):
    """The board is too hot to begin; later it is not."""


class TuningJobs(Jobs, Protocol):
    """The child processes, with looking at samples; the module :mod:`kiridashi_agent.jobs` is one."""

    def survey(self, request: TuneRequest, limits: Limits) -> Survey:
        """Count what a tuning would use."""
        ...


@dataclass(frozen=True)
class TuneWish:
    """Who wants a tuning, samples given for this once, and the time for the iterations (``None``: as configured)."""

    trigger: Literal["asked", "named"] = "asked"
    given: tuple[Path, ...] = ()
    seconds: float | None = None


class LineTuner:
    """Tunes what the lines of one device serve.

    Args:
        config: the device's settings.
        journal: what is durable.
        trust: checks the device's own seal.
        jobs: the child processes.
        runtimes: tells the names of the installed runtimes.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal,
        trust: TrustStore,
        jobs: TuningJobs,
        runtimes: Callable[[], Collection[str]] = installed_runtimes,
    ) -> None:
        self._config, self._journal, self._trust, self._jobs = config, journal, trust, jobs
        self._runtimes = runtimes
        self._state = config.device.state_dir

    def survey(self, line: str, wish: TuneWish) -> Survey:
        """What :meth:`tune` would use; changes nothing.

        Raises:
            StateError, InputError, BundleError, JobError: as :meth:`tune`.
        """
        active, _ = self._served(line, wish)
        request = tune_request(self._config, line, active.slot, active.artifact, wish.given, wish.seconds)
        return self._jobs.survey(request, tune_limits(self._config, request, None))

    def tune(self, line: str, wish: TuneWish, cancel: threading.Event | None = None) -> TuneRecord:
        """Tune what a line serves, and activate the result if the gate keeps it. The line goes on serving meanwhile.

        Raises:
            StateError: an update or another tuning of the line is under way, it serves nothing, or the board is hot.
            InputError: samples cannot be read.
            BundleError: the bundle cannot be tuned.
            JobError: the child crashed, hung or reached its memory limit.
            JobCancelledError: ``cancel`` was set, or the tuning made way for what a person wanted of the line.
        """
        if self._journal.is_wanted(line):
            raise StateError(f"line '{line}' is not tuned now", why="somebody undoes or imports a model there")
        with self._journal.lock(line, wait=False):
            self._settle(line)
            cancel = MakesWay(cancel, partial(self._journal.is_wanted, line))
            record = self._begun(line, wish)
            try:
                served = self._served(line, wish)
            except KiridashiError as error:
                if wish.trigger == "named" and not isinstance(error, TooHotError):  # heat passes, the rest does not
                    self._journal.write_tuning(line, _replace(record, phase="failed", error=_report(error)))
                raise
            self._journal.write_tuning(line, record)
            try:
                return self._carry_out(line, wish, record, served, cancel)
            except (JobCancelledError, KeyboardInterrupt):
                # Ended on purpose: it is no attempt that failed.
                self._give_up(line, _replace(record, phase="interrupted", attempts=max(0, record.attempts - 1)))
                raise
            except (KiridashiError, OSError) as error:
                wrapped = error if isinstance(error, KiridashiError) else _file_error(line, error)
                self._give_up(line, _replace(record, phase="failed", error=_report(wrapped)))
                raise wrapped from error

    def settle(self, line: str) -> None:
        """Finish or clear away what a tuning left that was killed; nothing happens while one is under way."""
        try:
            record = self._journal.tuning(line)
            if record is None or not record.is_under_way:
                return
            with ExitStack() as stack:
                try:
                    stack.enter_context(self._journal.lock(line, wait=False))
                except StateError as error:
                    _LOG.debug("line=%s whether a tuning was interrupted is looked at later: %s", line, error)
                    return
                self._settle(line)
        except (KiridashiError, OSError) as error:
            _LOG.warning("line=%s a tuning that was interrupted is cleared away later: %s", line, error)

    def _begun(self, line: str, wish: TuneWish) -> TuneRecord:
        active = LineSlots(self._state, line).served()
        before = self._journal.tuning(line)
        repeated = before is not None and before.is_to_be_repeated
        known = () if before is None or repeated else before.answers
        return TuneRecord(
            phase="tuning",
            trigger=wish.trigger,
            base=active.model_digest,
            # By hand they count once it comes to an end; by itself from the start, or a failure would be repeated.
            answers=known if wish.trigger == "asked" else self._newest_answers(line),
            attempts=1 + (before.attempts if before is not None and repeated and wish.trigger == "named" else 0),
        )

    def _newest_answers(self, line: str) -> tuple[str, ...]:
        return named_ids(self._state, line)[-_REMEMBERED_ANSWERS:]

    def _served(self, line: str, wish: TuneWish) -> tuple[Active, Manifest]:
        """What serves and can be tuned here and now."""
        phase = self._journal.line(line).state.phase
        if phase not in RESTING:
            raise StateError(
                f"line '{line}' cannot be tuned while an update is under way",
                why=f"the line is {phase}",
                next_step="wait until the line rests (kiridashi-agent status), then try again",
            )
        slots = LineSlots(self._state, line)
        active = slots.served()
        path = slots.folder(active.slot) / MANIFEST_NAME
        try:
            manifest = decode_manifest(path.read_bytes(), str(path))
        except OSError as error:
            raise _file_error(line, error) from error
        why = obstacle(self._config, line, manifest, self._runtimes(), given=bool(wish.given))
        if why:
            raise StateError(f"line '{line}' cannot be tuned", why=why)
        needed = needed_files(manifest, [manifest.artifact(active.artifact)], tune=True)
        absent = [entry.name for entry in needed if not (slots.folder(active.slot) / entry.name).is_file()]
        if absent:
            raise BundleError(
                f"line '{line}' cannot be tuned",
                why=f"{absent[0]} of its bundle was not fetched, because tuning was off then",
                next_step="publish the bundle again as a higher version",
            )
        celsius, limit = hottest_celsius(), self._config.limits.tune_max_celsius
        if celsius is not None and celsius > limit:
            why = f"it is at {celsius:.0f} C, the limit is {limit:g} C"
            raise TooHotError("the board is too hot to tune", why=why, next_step="let it cool down, then try again")
        return active, manifest

    def _carry_out(
        self,
        line: str,
        wish: TuneWish,
        record: TuneRecord,
        served: tuple[Active, Manifest],
        cancel: threading.Event | None,
    ) -> TuneRecord:
        active, manifest = served
        slots = LineSlots(self._state, line)
        sizes = sum(entry.bytes for entry in manifest.artifacts if entry.patches)
        check_room(slots.root, sizes, self._config.limits.free_disk_mib * MIB)
        bench = slots.lay_on_bench(active.slot)
        request = tune_request(self._config, line, BENCH, active.artifact, wish.given, wish.seconds)
        if active.tuned:
            request = _replace(request, serving=str(slots.folder(active.slot) / TUNED_NAME))
        answers = self._newest_answers(line)
        outcome = self._jobs.tune(request, tune_limits(self._config, request, cancel))
        record = _replace(record, report=outcome.report, answers=answers)
        if not outcome.report.kept:
            return self._close(line, _replace(record, phase="done"))
        measured = self._measured_inside(bench, manifest, active, outcome, cancel)
        self._trust.check_seal(self._state, bench / TUNED_NAME, outcome.artifact, manifest.digest, outcome.model_digest)
        ready = _replace(
            record,
            phase="activating",
            slot=slots.inactive_slot(),
            artifact=outcome.artifact,
            digest=outcome.model_digest,
            providers=self._config.lines[line].providers,
            threads=self._config.lines[line].threads,
            measured=measured,
        )
        self._journal.write_tuning(line, ready)
        return self._activate(line, ready)

    def _measured_inside(
        self, folder: Path, manifest: Manifest, active: Active, outcome: TuneOutcome, cancel: threading.Event | None
    ) -> Measurement | None:
        """The measurement of the tuned file where it is another than what serves, or the line's settings now have it
        computed in another way: it has to keep the budget too."""
        section = self._config.lines[manifest.line]
        now = (outcome.artifact, section.providers, section.threads)
        if now == (active.artifact, active.providers, active.threads):
            return None
        limits = Limits(self._config.limits.job_timeout_s, cancel=cancel)
        trial = Trial(self._jobs, self._state, folder, manifest, section, limits)
        measured, failures = trial.measure([manifest.artifact(outcome.artifact)])
        for error in failures.values():
            raise error
        if not measured[0].verdict.within:
            raise BudgetError(
                f"{active.artifact} goes on as it is: tuned, {outcome.artifact} would be over the budget",
                why=measured[0].verdict.describe(manifest.budget, measured[0].measurement),
            )
        return measured[0].measurement

    def _activate(self, line: str, record: TuneRecord) -> TuneRecord:
        """Move the bench into its slot and make it serve; may be done twice."""
        if record.slot is None:
            raise StateError(f"the journal names no slot for the tuned model of line '{line}'")
        slots = LineSlots(self._state, line)
        active = slots.served()
        if active.model_digest != record.digest:
            slots.take_bench(record.slot)
            active = Active(record.slot, record.artifact, record.digest, True, record.providers, record.threads)
            slots.activate(active)
        before = self._journal.line(line)
        if record.measured is not None:
            before = _replace(before, state=_replace(before.state, measured=record.measured))
        self._journal.write_line(line, with_active(before, active))
        return self._close(line, _replace(record, phase="done"))

    def _close(self, line: str, record: TuneRecord) -> TuneRecord:
        """Clear the bench, tell the server what it came to, and end the record."""
        LineSlots(self._state, line).clear_bench()
        line_record = self._journal.line(line)
        state = _replace(line_record.state, tuning=told(record))
        if record.report is not None:
            state = _replace(state, tune=record.report)
        self._journal.write_line(line, _replace(line_record, state=state))
        self._journal.write_tuning(line, record)
        _LOG.info("line=%s tuning: %s", line, state.tuning)
        return record

    def _give_up(self, line: str, record: TuneRecord) -> None:
        """End a tuning that did not come to its end. If its model serves already, the journal is left to be settled."""
        active, begun = LineSlots(self._state, line).active(), self._journal.tuning(line)
        if active is not None and begun is not None and active.model_digest == begun.digest:
            return
        try:
            self._close(line, record)
        except OSError as error:  # the disk is full: the journal still says that it was begun, and is settled later
            _LOG.error("line=%s that a tuning ended cannot be noted: %s", line, error)

    def _settle(self, line: str) -> None:
        record = self._journal.tuning(line)
        if record is None or not record.is_under_way:
            return
        active = LineSlots(self._state, line).active()
        rests = self._journal.line(line).state.phase in RESTING
        fits = active is not None and (
            active.model_digest == record.digest or (rests and active.model_digest == record.base)
        )
        error: KiridashiError = StateError(
            f"a tuning of line '{line}' was interrupted", why=f"its process ended while {record.phase}"
        )
        if record.phase == "activating" and fits:
            try:
                self._activate(line, record)
                return
            except KiridashiError as failure:
                error = failure
        self._close(line, _replace(record, phase="interrupted", error=_report(error)))


def told(record: TuneRecord) -> str:
    """What became of a tuning, in a sentence."""
    if record.error is not None:
        return f"{record.error.message}; the model that served goes on"
    if record.phase == "interrupted":
        return "the last tuning was interrupted; the model that served goes on"
    return in_words(record.report) if record.report is not None else "a tuning is under way"


def named_ids(state: Path, line: str) -> tuple[str, ...]:
    """The answers of people that give a class, oldest first.

    Raises:
        StateError: they cannot be read.
    """
    answers = AnswerLog(SpoolFolder(state, line).answers_path).answers()
    return tuple(answer.id for answer in answers if answer.kind == "class")


def _report(error: KiridashiError) -> ErrorReport:
    return ErrorReport(type(error).__name__, int(error.exit_code), str(error), "tuning")


def _file_error(line: str, error: OSError) -> StateError:
    return StateError(f"line '{line}' could not be tuned: a file could not be read or written", why=str(error))
