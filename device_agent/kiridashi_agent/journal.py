"""What the agent knows of its lines, durable before it acts on it.

One small file per line, one for its last tuning and one for its drift watch, one for a profile that was asked for, and
one for the device, each replaced as a whole. A file that cannot be read is set aside and the line starts from ``idle``
and says so: the active slot is not touched by that, so the old model keeps serving.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from kiridashi.artifacts import aside, is_shortage, remove, set_aside, sweep, write_atomic
from kiridashi.budget import Measurement
from kiridashi.drift.report import LineDrift
from kiridashi.errors import ExitCode, StateError
from kiridashi.messages import ErrorReport, LineState, ProbesState, TuneReport, check_name
from kiridashi.runtime.protocol import Provider
from kiridashi.slots import Slot

from kiridashi_agent.lifecycle import RESTING
from kiridashi_agent.locks import is_wanted, locked, locked_first
from kiridashi_agent.logs import RateLimited

_LOG = logging.getLogger(__name__)
_DEVICE = "device.json"
_PROFILE = "profile.json"
_DRIFT = ".drift.json"
MAX_ATTEMPTS = 3
"""How often an action is started that never ends: after that it is given up."""
MAX_STRANGERS = 16
"""Lines that this device is not configured for, of which it is noted that a model was wanted for them."""


class LineRecord(msgspec.Struct, frozen=True):
    """A line's state as reported, and what is needed to go on after a crash.

    In ``state``, phase, target, version, measured, verdict, tune, delivery and error tell of the target that was
    wanted last; slot, artifact, model_digest and tuned tell of the model that serves now.

    Attributes:
        generation: of the desired state that wanted the target.
        rollout: the rollout that wanted the target.
        slot: the slot that the target goes to; not the active one until it is activated.
        candidates: names of the artifacts that passed the probe.
        chosen: name of the artifact that was measured inside the budget and will be activated.
        tuned_digest: digest of the locally tuned model, empty when the untuned one will be activated.
        attempts: how often the phase's action was started without an end.
        imported_over: for a target that was imported, the target that the server wanted then; that wish is over.
        damaged: what serves was found damaged, and is to be fetched again.
        unread: the record could not be read now; it is as it was on the disk.
    """

    state: LineState = LineState(phase="idle")
    generation: int = 0
    rollout: str = ""
    slot: Slot | None = None
    candidates: tuple[str, ...] = ()
    chosen: str = ""
    tuned_digest: str = ""
    attempts: int = 0
    imported_over: str | None = None
    damaged: bool = False
    unread: bool = False


class UnreadError(StateError):
    """A record is there and cannot be read now; it is left as it is."""


class ProfileRecord(msgspec.Struct, frozen=True):
    """A profile that the server asked for: its state as reported, and what is needed to go on after a crash.

    ``seconds`` and ``threads`` are the request's; ``attempts`` is how often measuring was started without an end, and
    ``spent_s`` what starts that were interrupted have taken of the seconds.
    """

    state: ProbesState
    seconds: float
    threads: int
    attempts: int = 0
    spent_s: float = 0.0


class TuneRecord(msgspec.Struct, frozen=True):
    """The last tuning of the model that serves, beside any update.

    Attributes:
        phase: "tuning" on the bench; "activating": what was tuned is good and moves into ``slot``; then "done" (kept or
            not, see ``report``), "failed" (see ``error``), or "interrupted" before its end.
        trigger: a person "asked", or enough newly "named" frames came.
        base: digest of the model that served when it began.
        slot, artifact, digest, providers, threads: what is to be activated.
        measured: if it is another file than what served, or computed in another way.
        answers: the newest answers of people that it took into account, the newest last.
        attempts: how often it was started by itself without an end.
    """

    phase: Literal["tuning", "activating", "done", "failed", "interrupted"]
    trigger: Literal["asked", "named"]
    base: str
    slot: Slot | None = None
    artifact: str = ""
    digest: str = ""
    providers: tuple[Provider, ...] = ()
    threads: int = 0
    measured: Measurement | None = None
    answers: tuple[str, ...] = ()
    attempts: int = 0
    report: TuneReport | None = None
    error: ErrorReport | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether it has no end yet: somebody works on it, or was killed."""
        return self.phase in ("tuning", "activating")

    @property
    def is_to_be_repeated(self) -> bool:
        """Whether it began by itself, was interrupted, and is not given up."""
        return self.phase == "interrupted" and self.trigger == "named" and self.attempts < MAX_ATTEMPTS


class DeviceRecord(msgspec.Struct, frozen=True):
    """The highest generation of the desired state that the lines' records follow."""

    generation: int = 0


_Record = TypeVar("_Record", LineRecord, ProfileRecord, TuneRecord, DeviceRecord, LineDrift)


class Journal:
    """The records of one device in the folder ``<state>/journal``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._quiet = RateLimited(_LOG, every_s=60.0)

    def line(self, line: str) -> LineRecord:
        """The line's record; a fresh one when there is none. When it was damaged, one whose error says so.

        Raises:
            UnreadError: it is there and cannot be read now.
        """
        path = self._line_file(line)
        found = self._read(path, LineRecord)
        if found is None and aside(path).exists():
            message = f"the journal of line '{line}' was damaged: set aside as {aside(path).name}, begun anew"
            return LineRecord(LineState("idle", error=ErrorReport(StateError.__name__, ExitCode.STATE, message)))
        return found or LineRecord()

    def lines(self) -> dict[str, LineRecord]:
        """Every line that has a record; of one that cannot be read now, a resting one whose error says so."""
        names = {path.name.partition(".")[0] for path in self._folder.glob("[!.]*.line.json*")}
        return {name: self._readable(name) for name in sorted(names)}

    def _readable(self, line: str) -> LineRecord:
        try:
            return self.line(line)
        except UnreadError as error:
            self._quiet.warning("line=%s %s; %s", line, error, error.next_step)
            message = f"{error}; next: {error.next_step}; what the line serves is not touched"
            report = ErrorReport(StateError.__name__, ExitCode.STATE, message)
            return LineRecord(LineState("idle", error=report), unread=True)

    def prune(self, keep: Collection[str], most: int) -> list[str]:
        """Take away all that is noted of lines outside ``keep`` which serve nothing, but for the newest ``most``.

        Returns:
            The names of those that went.
        """
        strangers = []
        for name, record in self.lines().items():
            if name not in keep and not record.state.slot and record.state.phase in RESTING and not record.unread:
                newest = max(path.stat().st_mtime_ns for path in self._folder.glob(f"{name}.line.json*"))
                strangers.append((newest, name))
        gone = [name for _, name in sorted(strangers)[: max(0, len(strangers) - most)]]
        for name in gone:
            for path in self._folder.glob(f"{name}.*"):  # no line's name has a dot
                remove(path)
        return gone

    def sweep(self, line: str = "") -> None:
        """Remove what a killed process left half written of a line (while it is locked), or of the device itself."""
        for name in (self._line_file(line).name, self._tune_file(line).name) if line else (_DEVICE, _PROFILE):
            sweep(self._folder, name)

    def write_line(self, line: str, record: LineRecord) -> None:
        """Make a line's record durable."""
        write_atomic(self._line_file(line), msgspec.json.encode(record, order="sorted"), mode=0o600)

    def profile(self) -> ProfileRecord | None:
        """The profile that was asked for last; ``None`` when none was, or it cannot be read."""
        return self._read(self._folder / _PROFILE, ProfileRecord)

    def write_profile(self, record: ProfileRecord | None) -> None:
        """Make the profile's record durable; ``None`` takes it away."""
        if record is None:
            (self._folder / _PROFILE).unlink(missing_ok=True)
        else:
            write_atomic(self._folder / _PROFILE, msgspec.json.encode(record, order="sorted"), mode=0o600)

    def tuning(self, line: str) -> TuneRecord | None:
        """The last tuning of what a line serves; ``None`` when there was none, or its record cannot be read."""
        return self._read(self._tune_file(line), TuneRecord)

    def write_tuning(self, line: str, record: TuneRecord) -> None:
        """Make a tuning's record durable."""
        write_atomic(self._tune_file(line), msgspec.json.encode(record, order="sorted"), mode=0o600)

    def drift(self) -> dict[str, LineDrift]:
        """What the watch last said of every line that is watched; a record that cannot be read now is left out."""
        found = {}
        for path in sorted(self._folder.glob(f"*{_DRIFT}")):
            try:
                drift = self._read(path, LineDrift)
            except UnreadError as error:
                self._quiet.warning("%s; %s", error, error.next_step)
                continue
            if drift is not None:
                found[path.name.removesuffix(_DRIFT)] = drift
        return found

    def write_drift(self, line: str, drift: LineDrift | None) -> None:
        """Make what the watch says of a line durable; ``None`` takes it away."""
        path = self._folder / f"{check_name(line, 'line')}{_DRIFT}"
        if drift is None:
            path.unlink(missing_ok=True)
        else:
            write_atomic(path, msgspec.json.encode(drift, order="sorted"), mode=0o600)

    def device(self) -> DeviceRecord:
        """The device's record; a fresh one when there is none or it cannot be read."""
        return self._read(self._folder / _DEVICE, DeviceRecord) or DeviceRecord()

    def write_device(self, record: DeviceRecord) -> None:
        """Make the device's record durable."""
        write_atomic(self._folder / _DEVICE, msgspec.json.encode(record, order="sorted"), mode=0o600)

    def lock(self, name: str, *, wait: bool) -> AbstractContextManager[None]:
        """Hold the lock ``name`` against other processes on this state folder; raises as :func:`locks.locked`."""
        return locked(self._folder, name, wait=wait)

    def lock_first(self, line: str) -> AbstractContextManager[None]:
        """Hold a line's lock, for which a tuning makes way; raises as :func:`locks.locked_first`."""
        return locked_first(self._folder, line)

    def is_wanted(self, line: str) -> bool:
        """Whether somebody waits with :meth:`lock_first`."""
        return is_wanted(self._folder, line)

    def _line_file(self, line: str) -> Path:
        return self._folder / f"{check_name(line, 'line')}.line.json"

    def _tune_file(self, line: str) -> Path:
        return self._folder / f"{check_name(line, 'line')}.tune.json"

    def _read(self, path: Path, kind: type[_Record]) -> _Record | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            step = f"run this as the agent's account, and make the file that account's: chown kiridashi {path}"
            raise UnreadError(f"{path} cannot be read", why=str(error), next_step=step) from error
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and is_shortage(error):
                step = "see what else runs on this device; the agent tries again by itself"
                raise UnreadError(f"{path} cannot be read now", why=str(error), next_step=step) from error
            try:
                set_aside(path)
            except OSError as failure:  # a disk that breaks is often mounted read-only then: the agent outlives both
                self._quiet.warning("the journal %s was damaged (%s) and stays: %s", path, error, failure)
            else:
                _LOG.error("the journal %s was damaged (%s); set aside as %s", path, error, aside(path).name)
            return None
