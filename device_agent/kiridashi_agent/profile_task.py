"""A profile that the server asked for: fetch the probe set, measure it, hand the report over, clear up.

It is work for idle hours: the agent lets it run only while every line rests, and may interrupt it at any time. What is
done so far lies in the journal and in ``<state>/probes/<digest>``, so it goes on from there, also after a crash. It
has a few steps in a row and no way back, and so no part in the lines' lifecycle.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.budget import MIB
from kiridashi.config import Config
from kiridashi.errors import InputError, KiridashiError, NetworkError, RuntimeUnavailableError, StateError
from kiridashi.messages import (
    MAX_CONTROL_BYTES,
    ErrorReport,
    ProbesDesired,
    ProbesState,
    ProfilePhase,
    Request,
    digest_in,
    encode,
    probes_path,
)
from kiridashi.probes import PROBE_SET_NAME, ProbeReport, check_limits
from kiridashi.runtime import installed_runtimes

from kiridashi_agent.download import download
from kiridashi_agent.journal import MAX_ATTEMPTS, Journal, ProfileRecord
from kiridashi_agent.metadata import TrustStore
from kiridashi_agent.process import JobCancelledError
from kiridashi_agent.profiling import ProfileSettings
from kiridashi_agent.transport import Interruptible, NotFoundError, RefusedError, Transport, request_one

_LOG = logging.getLogger(__name__)
PROBES_FOLDER = "probes"
REPORT_NAME = "report.json"
RECORD_NAME = "record.json"
RESTING: frozenset[ProfilePhase] = frozenset({"sent", "failed"})
_TELL_EVERY_S = 10.0
_SHORTEST_S = 1.0
_replace = msgspec.structs.replace


class MeasureProbes(Protocol):
    """Measures a folder with a probe set and its files; see :func:`kiridashi_agent.profiling.measure_probes`."""

    def __call__(
        self,
        folder: Path,
        record: Path,
        settings: ProfileSettings,
        *,
        cancel: threading.Event | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> ProbeReport:
        """Go on from ``record``; ends early, with or without an incomplete report, once ``cancel`` is set."""


def adopted(record: ProfileRecord | None, wanted: ProbesDesired | None) -> ProfileRecord | None:
    """The record once ``wanted`` is taken: the same object when nothing changes. Pure.

    A profile that is finished, or failed, stays known until another is wanted; one that is no longer wanted ends.
    """
    if wanted is None:
        return record if record is not None and record.state.phase in RESTING else None
    if record is not None and (wanted.target, wanted.request) == (record.state.target, record.state.request):
        return record
    return ProfileRecord(ProbesState(wanted.target, wanted.request, "waiting"), wanted.seconds, wanted.threads)


class ProfileTask:
    """The steps of a profile. Each may be done twice; nothing a line uses is touched.

    Args:
        config: the device's settings.
        transport: the way to the server.
        trust: what of the server is believed.
        journal: what is durable.
        measure: measures what was fetched.
        runtimes: tells the names of the installed runtimes.
    """

    def __init__(
        self,
        config: Config,
        transport: Transport,
        trust: TrustStore,
        journal: Journal,
        measure: MeasureProbes,
        runtimes: Callable[[], Collection[str]] = installed_runtimes,
    ) -> None:
        self._limits = config.limits
        self._device_class = config.device.device_class
        self._folder = config.device.state_dir / PROBES_FOLDER
        self._transport = transport
        self._trust = trust
        self._journal = journal
        self._measure_probes = measure
        self._runtimes = runtimes
        self._told_at = -_TELL_EVERY_S
        self._steps: dict[ProfilePhase, Callable[[ProfileRecord, threading.Event], None]] = {
            "waiting": lambda record, _: self._enter(record, "fetching"),
            "fetching": self._fetch,
            "measuring": self._measure,
            "sending": self._send,
        }

    def is_open(self) -> bool:
        """Whether there is something to do."""
        record = self._journal.profile()
        return record is not None and record.state.phase not in RESTING

    def is_news(self, wanted: ProbesDesired | None) -> bool:
        """Whether :meth:`adopt` would change anything."""
        record = self._journal.profile()
        return adopted(record, wanted) is not record

    def adopt(self, wanted: ProbesDesired | None) -> None:
        """Make the wish durable; not to be called while :meth:`run` runs."""
        self._journal.write_profile(adopted(self._journal.profile(), wanted))
        self._clear()

    def run(self, cancel: threading.Event) -> None:
        """Work until the report is with the server, the task has failed, or ``cancel`` is set.

        While the server cannot be reached it waits and tries again.
        """
        while not cancel.is_set():
            record = self._journal.profile()
            if record is None or record.state.phase in RESTING:
                break
            try:
                self._steps[record.state.phase](record, cancel)
            except JobCancelledError:
                break
            except NetworkError as error:
                if isinstance(error, NotFoundError | RefusedError):
                    self._fail(error)
                else:
                    self._note_error(error)
                    cancel.wait(self._limits.retry_wait_s)
            except KiridashiError as error:
                self._fail(error)
            except OSError as error:
                self._fail(StateError("a file of the probe set could not be read or written", why=str(error)))
        self._clear()

    def _fetch(self, record: ProfileRecord, cancel: threading.Event) -> None:
        requests = Interruptible(self._transport, cancel)
        probes = self._trust.fetch_probe_set(requests, record.state.target)
        check_limits(probes, record.seconds, record.threads)
        if probes.runtime not in self._runtimes():
            raise RuntimeUnavailableError(
                f"the probe set '{probes.name}' needs {probes.runtime}",
                why=f"installed here: {', '.join(sorted(self._runtimes())) or 'none'}",
                next_step="pip install 'kiridashi[line]' (onnxruntime) or 'kiridashi[litert]' on the device",
            )
        folder = self._place(record)
        write_atomic(folder / PROBE_SET_NAME, probes.encode())
        files = [graph.artifact for graph in probes.graphs]
        keep_free = self._limits.free_disk_mib * MIB
        delivery = download(requests, folder, files, elsewhere={}, keep_free_bytes=keep_free)
        _LOG.info("profile: fetched %d files, %d bytes over the wire", len(files), delivery.bytes)
        self._enter(record, "measuring")

    def _measure(self, record: ProfileRecord, cancel: threading.Event) -> None:
        """Counted in the journal first, so that what takes the whole process down is not repeated for ever.

        A start gets what earlier ones have left of the time; what is measured until then is the report.
        """
        if record.attempts >= MAX_ATTEMPTS:
            raise StateError(
                "the profile was given up while measuring",
                why=f"the agent ended {record.attempts} times without finishing it",
                next_step="see the system's log for what ended it (out of memory, power), then ask for it again",
            )
        self._journal.write_profile(_replace(record, attempts=record.attempts + 1))
        folder = self._place(record)
        seconds = max(_SHORTEST_S, record.seconds - record.spent_s)
        settings = ProfileSettings(record.threads, seconds, device_class=self._device_class)
        started = time.monotonic()
        try:
            report = self._measure_probes(
                folder, folder / RECORD_NAME, settings, cancel=cancel, tell=self._note_progress
            )
        except JobCancelledError:
            self._interrupted(record, time.monotonic() - started)
            raise
        if cancel.is_set() and not report.complete:
            self._interrupted(record, time.monotonic() - started)
            return
        body = msgspec.json.encode(report, order="sorted")
        if len(encode(_handing_over(record, body))) > MAX_CONTROL_BYTES:
            raise InputError(
                f"the report of {len(report.timings)} graphs has {len(body)} bytes",
                why=f"it must fit into one message of {MAX_CONTROL_BYTES} bytes",
                next_step="make a smaller probe set",
            )
        write_atomic(folder / REPORT_NAME, body)
        self._enter(record, "sending")

    def _send(self, record: ProfileRecord, cancel: threading.Event) -> None:
        try:
            body = (self._place(record) / REPORT_NAME).read_bytes()
            msgspec.json.decode(body)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _LOG.error("profile: the report is damaged (%s); measuring goes on", error)
            self._enter(record, "measuring")
            return
        request_one(Interruptible(self._transport, cancel), _handing_over(record, body))
        self._enter(record, "sent")

    def _clear(self) -> None:
        """Delete what no open task needs: files of finished, failed and superseded ones."""
        record = self._journal.profile()
        kept = record.state.target if record is not None and record.state.phase not in RESTING else ""
        for folder in sorted(self._folder.glob("*")):
            if probes_path(folder.name) != kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _place(self, record: ProfileRecord) -> Path:
        return self._folder / digest_in(record.state.target)

    def _enter(self, record: ProfileRecord, phase: ProfilePhase) -> None:
        state = ProbesState(record.state.target, record.state.request, phase)
        self._journal.write_profile(_replace(record, state=state, attempts=0))
        self._tell(state)

    def _fail(self, error: KiridashiError) -> None:
        record = self._note_error(error)
        if record is not None:
            failed = _replace(record, state=_replace(record.state, phase="failed"))
            self._journal.write_profile(failed)
            self._tell(failed.state)

    def _note_error(self, error: KiridashiError) -> ProfileRecord | None:
        _LOG.error("profile: %s", error)
        record = self._journal.profile()
        if record is None:
            return None
        report = ErrorReport(type(error).__name__, int(error.exit_code), str(error), record.state.phase)
        noted = _replace(record, state=_replace(record.state, error=report))
        self._journal.write_profile(noted)
        return noted

    def _interrupted(self, record: ProfileRecord, spent_s: float) -> None:
        """An interruption on purpose is not one of the attempts; the progress that was noted stays."""
        newest = self._journal.profile() or record
        spent_s += record.spent_s
        self._journal.write_profile(_replace(newest, attempts=record.attempts, spent_s=spent_s))

    def _note_progress(self, done: int, total: int) -> None:
        """Durable, because reports are built from the journal; not too often, because of flash memory."""
        now, record = time.monotonic(), self._journal.profile()
        if record is None or now - self._told_at < _TELL_EVERY_S:
            return
        self._told_at = now
        self._journal.write_profile(_replace(record, state=_replace(record.state, done=done, total=total)))

    def _tell(self, state: ProbesState) -> None:
        body = {"phase": state.phase, "target": state.target, "request": state.request}
        if state.error is not None:
            body |= {"error": state.error.kind, "message": state.error.message}
        _LOG.info("profile %s", " ".join(f"{key}={value}" for key, value in body.items()))
        try:
            self._transport.publish_event(f"profile-{state.phase}", body)
        except NetworkError as error:
            _LOG.warning("the event was not sent: %s", error)


def _handing_over(record: ProfileRecord, body: bytes) -> Request:
    return Request(method="report", index=record.state.request, body=msgspec.Raw(body))
