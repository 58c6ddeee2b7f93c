"""Carrying out the lifecycle's actions for one line. Each action may be done twice; none touches the active model.

An action takes the line's record and returns the event it led to and the record as it is then; the agent makes the
record durable. Errors become events here: no connection means ``offline``, everything else ``refused``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec
from kiridashi.artifacts import MANIFEST_NAME, check_file, write_atomic
from kiridashi.budget import MIB
from kiridashi.config import Config, LineSection
from kiridashi.errors import BudgetError, KiridashiError, NetworkError, StateError
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi.messages import ErrorReport
from kiridashi.runtime import installed_runtimes
from kiridashi.slots import TUNED_NAME, Active, LineSlots, Slot

from kiridashi_agent.choice import (
    Measured,
    can_be_tuned,
    candidates,
    explained,
    fastest_within,
    given_way,
    nearest,
    needed_files,
    postponed,
    reopened,
)
from kiridashi_agent.download import Place, check_room, chunk_places, download
from kiridashi_agent.journal import LineRecord
from kiridashi_agent.lifecycle import Action, Event
from kiridashi_agent.metadata import ClockError, TrustStore
from kiridashi_agent.process import JobCancelledError, Limits
from kiridashi_agent.transport import Interruptible, NotFoundError, RefusedError, Requests
from kiridashi_agent.trial import Jobs, Trial
from kiridashi_agent.tune_terms import in_words, obstacle, tune_limits, tune_request

_LOG = logging.getLogger(__name__)
INCOMING_NAME = "incoming.json"
_TO_TUNING: Event = "chosen-for-tuning"
_AS_IT_IS: Event = "chosen"
Result = tuple[Event, LineRecord]
_replace = msgspec.structs.replace


class Actions:
    """The actions of all lines of one device.

    Args:
        config: the device's settings.
        transport: the way to the server.
        trust: what of the server is believed.
        jobs: how files are probed, measured and tuned.
        stop: when set, a running job is ended and its ``JobCancelledError`` is passed on.
        runtimes: tells the names of the installed runtimes.
    """

    def __init__(
        self,
        config: Config,
        transport: Requests,
        trust: TrustStore,
        jobs: Jobs,
        stop: threading.Event,
        runtimes: Callable[[], Collection[str]] = installed_runtimes,
    ) -> None:
        self._config = config
        self._state = config.device.state_dir
        self._transport = Interruptible(transport, stop)
        self._trust = trust
        self._jobs = jobs
        self._runtimes = runtimes
        self._limits = Limits(seconds=config.limits.job_timeout_s, cancel=stop)
        self._by_name: dict[Action, Callable[[str, LineRecord], Result]] = {
            "fetch": self._fetch,
            "download": self._download,
            "probe": self._probe,
            "measure": self._measure,
            "tune": self._tune,
            "validate": self._validate,
            "activate": self._activate,
        }

    def run(self, action: Action, line: str, record: LineRecord) -> Result:
        """Carry out one action of the table (not ``none``, ``wait`` or ``discard``).

        Raises:
            JobCancelledError: the agent is shutting down; the same action is to be done again later.
        """
        try:
            return self._by_name[action](line, record)
        except JobCancelledError:
            raise
        except ClockError as error:
            return "offline", with_error(record, error)  # it is set by NTP later, or by hand
        except NetworkError as error:
            final = isinstance(error, NotFoundError | RefusedError)
            return ("refused" if final else "offline"), with_error(record, error)
        except KiridashiError as error:
            return "refused", with_error(record, error)
        except OSError as error:
            wrapped = StateError(f"line '{line}': a file could not be read or written", why=str(error))
            return "refused", with_error(record, wrapped)

    def discard(self, line: str, record: LineRecord) -> None:
        """Empty the slot of a refused target. It could not be activated any more; this frees the disk."""
        slots = LineSlots(self._state, line)
        try:
            active = slots.active()
            is_active = active is not None and active.slot == record.slot
            if record.slot is not None and not is_active and _holds_incoming(slots, record.slot):
                slots.prepare(record.slot)
        except (StateError, OSError) as error:
            _LOG.warning("line=%s the refused target's files stay: %s", line, error)

    def check_seal(self, tuned: Path, artifact: str, parent: str, digest: str) -> None:
        """Check a tuned file; arguments and errors as :func:`kiridashi.trust.check_tuned`."""
        self._trust.check_seal(self._state, tuned, artifact, parent, digest)

    def _fetch(self, line: str, record: LineRecord) -> Result:
        manifest = self._trust.fetch_manifest(self._transport, line, record.state.target)
        candidates(manifest, self._runtimes(), self._line(line).runtime)  # none at all: refused before any download
        slots = LineSlots(self._state, line)
        write_atomic(slots.root / INCOMING_NAME, manifest.encode())
        state = _replace(record.state, version=manifest.version, error=None)
        return "fetched", _replace(record, state=state, slot=slots.inactive_slot())

    def _download(self, line: str, record: LineRecord) -> Result:
        slots, slot = LineSlots(self._state, line), _slot(record)
        manifest = decode_manifest((slots.root / INCOMING_NAME).read_bytes(), str(slots.root / INCOMING_NAME))
        runnable = candidates(manifest, self._runtimes(), self._line(line).runtime)
        # Samples may come later, and the line be tuned then without the server.
        can_tune = not obstacle(self._config, line, manifest, self._runtimes(), given=True)
        files = needed_files(manifest, runnable, tune=can_tune)
        keep_free = self._config.limits.free_disk_mib * MIB
        folder = _prepared(slots, slot, manifest, sum(file.bytes for file in files), keep_free)
        delivery = download(self._transport, folder, files, elsewhere=_donated(slots), keep_free_bytes=keep_free)
        return "downloaded", _replace(record, state=_replace(record.state, delivery=delivery, error=None))

    def _probe(self, line: str, record: LineRecord) -> Result:
        trial, manifest = self._trial(line, record)
        trials, failure = trial.probe(candidates(manifest, self._runtimes(), self._line(line).runtime))
        record = _replace(record, state=_replace(record.state, trials=trials))
        if failure is not None:
            return "refused", with_error(record, failure)
        return "probed", _replace(record, candidates=tuple(entry.artifact for entry in trials if not entry.reason))

    def _measure(self, line: str, record: LineRecord) -> Result:
        trial, manifest = self._trial(line, record)
        passed = [manifest.artifact(name) for name in record.candidates]
        why_not = obstacle(self._config, line, manifest, self._runtimes())
        tunable = [artifact for artifact in passed if not why_not and can_be_tuned(manifest, artifact)]
        measured, failures = trial.measure(tunable)
        best, event = fastest_within(measured), _TO_TUNING
        if best is None:
            if tunable:
                why_not = "no float32 file is inside the budget"
                _LOG.warning("line=%s %s; trying the others", line, why_not)
            others, more_failures = trial.measure([artifact for artifact in passed if artifact not in tunable])
            best, event = fastest_within(others), _AS_IT_IS
            measured, failures = [*measured, *others], failures | more_failures
        trials = explained(record.state.trials, measured, failures, manifest.budget, best)
        record = _replace(record, state=_replace(record.state, trials=trials))
        if best is not None:
            chosen = _choose(record, best)
            untuned = event == _AS_IT_IS and (tunable or self._serves_tuned(line))
            return event, self._untuned(line, chosen, why_not) if untuned else chosen
        closest = nearest(measured)
        if closest is None:
            return "refused", with_error(record, next(iter(failures.values())))
        error = BudgetError(
            f"no file of line '{line}' version {manifest.version} is inside the budget {manifest.budget}",
            why=f"{closest.artifact}, the nearest: {closest.verdict.describe(manifest.budget, closest.measurement)}",
            next_step="cut a smaller model for this device, or allow it more",
        )
        state = _replace(record.state, measured=closest.measurement, verdict=closest.verdict)
        return "refused", with_error(_replace(record, state=state), error)

    def _tune(self, line: str, record: LineRecord) -> Result:
        self._line(line)
        request = tune_request(self._config, line, _slot(record), record.chosen)
        try:
            outcome = self._jobs.tune(request, tune_limits(self._config, request, self._limits.cancel))
        except JobCancelledError:
            raise
        except KiridashiError as error:
            # The shipped model was measured and is sound: it goes on untuned, and the report says why.
            _LOG.error("line=%s tuning failed, the untuned model goes on: %s", line, error)
            return "tuned", with_error(self._untuned(line, self._fastest(line, record), str(error)), error)
        report = outcome.report
        record = _replace(record, state=_replace(record.state, tune=report))
        if report.kept and outcome.artifact != record.chosen:
            record = self._instead(line, record, outcome.artifact)
        if not (report.kept and outcome.artifact == record.chosen):
            why = f"tuned, {outcome.artifact} would be over the budget" if report.kept else report.reason
            return "tuned", self._untuned(line, self._fastest(line, record), why)
        state = _replace(record.state, tuning=in_words(report))
        return "tuned", _replace(record, state=state, tuned_digest=outcome.model_digest)

    def _instead(self, line: str, record: LineRecord, artifact: str) -> LineRecord:
        """The record with another file chosen, if that is inside the budget: the chosen one is not tuned."""
        trial, manifest = self._trial(line, record)
        best = fastest_within(trial.measure([manifest.artifact(artifact)])[0])
        if best is None:
            return record
        trials = given_way(record.state.trials, artifact)
        return _choose(_replace(record, state=_replace(record.state, trials=trials)), best)

    def _fastest(self, line: str, record: LineRecord) -> LineRecord:
        """The record with the fastest file of all chosen: those that cannot be tuned had been postponed."""
        trial, manifest = self._trial(line, record)
        waiting = [manifest.artifact(name) for name in postponed(record.state.trials)]
        if not waiting or record.state.measured is None or record.state.verdict is None:
            return record
        others, failures = trial.measure(waiting)
        measured = [Measured(record.chosen, record.state.measured, record.state.verdict), *others]
        best = fastest_within(measured) or measured[0]
        trials = explained(reopened(record.state.trials), measured, failures, manifest.budget, best)
        return _choose(_replace(record, state=_replace(record.state, trials=trials)), best)

    def _validate(self, line: str, record: LineRecord) -> Result:
        folder, manifest = self._bundle(line, record)
        artifact = manifest.artifact(record.chosen)
        check_file(folder / artifact.name, artifact)
        if record.tuned_digest:
            self.check_seal(folder / TUNED_NAME, artifact.name, manifest.digest, record.tuned_digest)
        return "validated", record

    def _activate(self, line: str, record: LineRecord) -> Result:
        slots = LineSlots(self._state, line)
        _, manifest = self._bundle(line, record)
        tuned = bool(record.tuned_digest)
        section, digest = self._line(line), record.tuned_digest or manifest.digest
        active = Active(_slot(record), record.chosen, digest, tuned, section.providers, section.threads)
        try:
            slots.activate(active)
        except OSError as error:
            if slots.active() != active:
                raise
            _LOG.error("line=%s the pointer was moved, and may not survive a power cut: %s", line, error)
        try:
            (slots.root / INCOMING_NAME).unlink(missing_ok=True)
            slots.sweep()
        except OSError as error:  # it serves already, and what is left harms nothing
            _LOG.warning("line=%s what the update left stays for now: %s", line, error)
        return "activated", _replace(with_active(record, active), damaged=False)

    def _line(self, line: str) -> LineSection:
        section = self._config.lines.get(line)
        if section is None:
            raise StateError(f"line '{line}' is no longer in the configuration", next_step=f"add [lines.{line}]")
        return section

    def _untuned(self, line: str, record: LineRecord, why: str) -> LineRecord:
        """Say why the target goes on untuned, above all if weights that were tuned here are given up with it."""
        lost = "the weights that were tuned on this device are not carried over; " if self._serves_tuned(line) else ""
        tuning = f"{lost}{record.chosen} is untuned: {why}"
        _LOG.warning("line=%s %s", line, tuning)
        return _replace(record, state=_replace(record.state, tuning=tuning))

    def _serves_tuned(self, line: str) -> bool:
        active = LineSlots(self._state, line).active()
        return active is not None and active.tuned

    def _bundle(self, line: str, record: LineRecord) -> tuple[Path, Manifest]:
        folder = LineSlots(self._state, line).folder(_slot(record))
        return folder, decode_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))

    def _trial(self, line: str, record: LineRecord) -> tuple[Trial, Manifest]:
        folder, manifest = self._bundle(line, record)
        return Trial(self._jobs, self._state, folder, manifest, self._line(line), self._limits), manifest


def with_error(record: LineRecord, error: KiridashiError) -> LineRecord:
    """The record with what went wrong, as it will be reported."""
    report = ErrorReport(type(error).__name__, int(error.exit_code), str(error), record.state.phase)
    return _replace(record, state=_replace(record.state, error=report))


def with_active(record: LineRecord, active: Active) -> LineRecord:
    """The record with what serves now."""
    state = _replace(
        record.state,
        slot=active.slot,
        artifact=active.artifact,
        model_digest=active.model_digest,
        tuned=active.tuned,
    )
    return _replace(record, state=state)


def _prepared(slots: LineSlots, slot: Slot, manifest: Manifest, needed_bytes: int, keep_free_bytes: int) -> Path:
    """The slot's folder: as it is when it holds a part of this bundle, else emptied and given the manifest."""
    folder, previous = slots.folder(slot), slots.previous()
    # Tuning writes beside the files, so a slot whose tuned model can still be gone back to is not built upon.
    is_way_back = previous is not None and previous.slot == slot and previous.tuned
    if _holds_incoming(slots, slot) and not is_way_back:
        return folder
    freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_room(slots.root, needed_bytes - freed, keep_free_bytes)
    folder = slots.prepare(slot)
    write_atomic(folder / MANIFEST_NAME, manifest.encode())
    return folder


def _donated(slots: LineSlots) -> dict[str, Place]:
    """Where the chunks of the active bundle lie; nowhere if its manifest was damaged."""
    active = slots.active()
    if active is None:
        return {}
    donor = slots.folder(active.slot)
    try:
        return chunk_places(donor, decode_manifest((donor / MANIFEST_NAME).read_bytes(), str(donor)))
    except (KiridashiError, OSError) as error:
        _LOG.warning("line=%s nothing is copied from the active slot: %s", slots.line, error)
        return {}


def _holds_incoming(slots: LineSlots, slot: Slot) -> bool:
    here, incoming = slots.folder(slot) / MANIFEST_NAME, slots.root / INCOMING_NAME
    return here.is_file() and incoming.is_file() and here.read_bytes() == incoming.read_bytes()


def _choose(record: LineRecord, best: Measured) -> LineRecord:
    state = _replace(record.state, measured=best.measurement, verdict=best.verdict)
    return _replace(record, state=state, chosen=best.artifact, tuned_digest="")


def _slot(record: LineRecord) -> Slot:
    if record.slot is None:
        raise StateError("the journal names no slot for this update", next_step="retry the rollout")
    return record.slot
