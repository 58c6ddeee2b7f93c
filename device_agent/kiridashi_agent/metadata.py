"""Trust: from a target path to a manifest or a probe set that this device may use.

The pinned root of the enrolment is the only thing believed; everything else is checked against it, by TUF (see
:mod:`kiridashi_agent.tuf_client`). A refusal changes nothing: the model that serves keeps serving.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kiridashi.artifacts import open_lock, write_atomic
from kiridashi.errors import BundleError, NetworkError, StateError, TrustError
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi.messages import Request, digest_in, target_path
from kiridashi.probes import ProbeSet, decode_probe_set

from kiridashi_agent.transport import Requests, request_one
from kiridashi_agent.trust_child import FetchOrder, RunOrder, SealOrder, run_in_child

PINNED_ROOT = Path("trust/root.json")
_CLOCK_NAME = "clock-floor"
# A clock may be set back a little by NTP; more than this and an expired signature could pass for a valid one.
CLOCK_SLACK_S = 3600.0
LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.05


class ClockError(TrustError):
    """The device's clock is behind the last trusted update; nothing is wrong with the update."""


class TrustStore:
    """The device's TUF metadata folder: what it has seen, so that it never believes anything older."""

    def __init__(self, folder: Path, root: bytes, run: RunOrder = run_in_child) -> None:
        self._folder = folder
        self._root = root
        self._run = run

    def fetch_manifest(self, transport: Requests, line: str, target: str) -> Manifest:
        """Refresh the metadata and return the verified manifest of ``target``.

        Raises:
            ClockError: the clock is behind the last trusted update.
            TrustError: metadata or target failed a check; the message says which.
            BundleError: the signed manifest cannot be read, or is of another line or version than its path says.
            NetworkError: no connection or no answer; nothing is known about the target then.
        """
        manifest = decode_manifest(self._fetch(transport, target), target)
        if target_path(manifest.line, manifest.version) != target or manifest.line != line:
            raise BundleError(
                f"the manifest at {target} is for line '{manifest.line}' version {manifest.version}",
                why=f"it was wanted for line '{line}'",
                next_step="publish the bundle of that line again",
            )
        return manifest

    def fetch_probe_set(self, transport: Requests, target: str) -> ProbeSet:
        """Refresh the metadata and return the verified probe set of ``target``.

        Raises:
            InputError: ``target`` is not the path of a probe set.
            TrustError, NetworkError: as :meth:`fetch_manifest`.
            BundleError: the signed probe set cannot be read, or is another one than its path says.
        """
        digest = digest_in(target)
        probes = decode_probe_set(self._fetch(transport, target), target)
        if probes.digest != digest:
            raise BundleError(
                f"{target} holds another probe set",
                why=f"the digest of its content is {probes.digest}",
                next_step="publish the probe set again (kiridashi profile publish)",
            )
        return probes

    def check_seal(self, state: Path, tuned: Path, artifact: str, parent: str, digest: str) -> None:
        """Check that this device sealed the tuned file; arguments and errors as :func:`kiridashi.trust.check_tuned`."""

        def never(request: Request) -> bytes:
            raise StateError(f"checking a seal needs nothing of the server, and asked for '{request.name}'")

        self._run(SealOrder(str(state), str(tuned), artifact, parent, digest), never)

    def _fetch(self, transport: Requests, target: str) -> bytes:
        """The verified bytes of a target; the time at which they were found valid is noted."""
        self._check_clock(time.time())
        order = FetchOrder(str(self._folder), self._root, target)
        with self._alone():
            data = self._run(order, lambda request: request_one(transport, request))
        write_atomic(self._folder / _CLOCK_NAME, f"{time.time():.0f}\n".encode())
        return data

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Agent and import may run at once, and python-tuf's own files know no lock.

        The wait has an end: a stick that hangs must not take the agent's loop with it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + LOCK_WAIT_S
        with os.fdopen(open_lock(self._folder / ".lock"), "w") as lock:
            while not _locked(lock):
                if time.monotonic() >= deadline:
                    raise NetworkError(
                        f"the metadata in {self._folder} is in use by another process",
                        why=f"it was not free within {LOCK_WAIT_S:g} s: an agent or an import is fetching",
                        next_step="wait for it, then try again; the agent does so by itself",
                    )
                time.sleep(_LOCK_POLL_S)
            yield

    def _check_clock(self, now_s: float) -> None:
        floor_s = clock_floor_s(self._folder)
        if now_s < floor_s - CLOCK_SLACK_S:
            raise ClockError(
                "the device's clock went back",
                why=f"it is {floor_s - now_s:.0f} s behind the last trusted update, so an expired signature "
                "could not be told from a valid one",
                next_step="set the clock (timedatectl set-ntp true); the agent goes on by itself then",
            )


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_pinned_root(state: Path) -> bytes:
    """The TUF root that was pinned at enrolment.

    Raises:
        StateError: it is missing.
    """
    try:
        return (state / PINNED_ROOT).read_bytes()
    except OSError as error:
        raise StateError(
            f"the pinned root {state / PINNED_ROOT} cannot be read",
            why=str(error),
            next_step="install the ticket of the enrolment again: kiridashi-agent enroll install",
        ) from error


def clock_floor_s(folder: Path) -> float:
    """The latest time (Unix seconds) at which metadata in ``folder`` was found valid; 0 if never."""
    try:
        return float((folder / _CLOCK_NAME).read_text())
    except (OSError, ValueError):
        return 0.0
