"""What ``kiridashi doctor`` looks at on a plant server: each check says what it saw and what to do about it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from kiridashi.errors import ExitCode, KiridashiError

from kiridashi_server.fleet.connection import Connection
from kiridashi_server.fleet.published import Committed
from kiridashi_server.fleet.server import PlantServer

Level = Literal["ok", "warning", "failed"]
WARN_BEFORE = timedelta(days=60)
LOW_DISK_BYTES = 1024**3


@dataclass(frozen=True)
class Check:
    """One finding. ``code`` is the exit code that a failed one stands for."""

    name: str
    level: Level
    detail: str
    next_step: str = ""
    code: ExitCode = ExitCode.STATE


def check_server(server: PlantServer, now: datetime) -> tuple[Check, ...]:
    """All checks of a plant server that reads its folder, its database and its broker."""
    return (
        *_check_repository(server, now),
        *_check_certificates(server, now),
        _check_registry(server),
        _check_disk(server.folder),
        _check_broker(server),
    )


def expiry_check(
    name: str, expires: datetime, now: datetime, next_step: str, warn_before: timedelta = WARN_BEFORE
) -> Check:
    """Whether something expires soon or has expired."""
    left = expires - now
    detail = f"valid until {expires:%Y-%m-%d %H:%M} UTC"
    if left <= timedelta(0):
        return Check(name, "failed", f"expired on {expires:%Y-%m-%d}", next_step, ExitCode.TRUST)
    return Check(name, "warning", detail, next_step) if left < warn_before else Check(name, "ok", detail)


def failed(name: str, error: KiridashiError) -> Check:
    """A check that ended with an error."""
    return Check(name, "failed", str(error), error.next_step, error.exit_code)


def _check_repository(server: PlantServer, now: datetime) -> tuple[Check, ...]:
    try:
        state = server.repository.published.committed()
    except KiridashiError as error:
        return (failed("signed repository", error),)
    return (
        expiry_check("root signature", state.root.signed.expires, now, "kiridashi fleet rotate-root"),
        expiry_check(
            "timestamp signature",
            state.timestamp.signed.expires,
            now,
            "kiridashi serve (it renews the timestamp while it runs)",
            timedelta(hours=12),
        ),
        expiry_check(
            "line signatures", _first_targets_expiry(state), now, "kiridashi serve, with the signing keys in place"
        ),
    )


def _first_targets_expiry(state: Committed) -> datetime:
    delegated = (role.signed.expires for role in state.delegated.values())
    return min([state.targets.signed.expires, *delegated])


def _check_certificates(server: PlantServer, now: datetime) -> tuple[Check, ...]:
    renew = f"move {server.folder / 'tls'} away, then kiridashi fleet init --state {server.folder}"
    checks = [
        expiry_check(
            "authority certificate",
            server.authority.certificate.not_valid_after_utc,
            now,
            "enrol the devices again under a new authority",
        )
    ]
    for name, path in (
        ("broker certificate", server.broker_files.certificate),
        ("server certificate", server.client_files.certificate),
    ):
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            checks.append(Check(name, "failed", str(error), renew))
        else:
            checks.append(expiry_check(name, certificate.not_valid_after_utc, now, renew))
    return tuple(checks)


def _check_registry(server: PlantServer) -> Check:
    try:
        devices = server.registry.devices()
    except KiridashiError as error:
        return failed("registry", error)
    unsent = len(server.registry.unsent())
    detail = f"{len(devices)} devices, {len(server.registry.lines())} lines, {unsent} devices not told yet"
    return Check("registry", "ok", detail)


def _check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free >= LOW_DISK_BYTES else "warning"
    return Check("disk", level, f"{free / 1024**3:.1f} GiB free in {folder}", "make room for new models")


def _check_broker(server: PlantServer) -> Check:
    name = f"broker at {server.broker_address}"
    client_id = f"kiridashi-doctor-{server.settings.instance}"
    connection = Connection(server.broker_address, server.client_files, client_id)
    try:
        connection.open(timeout_s=5.0)
    except KiridashiError as error:
        return failed(name, error)
    connection.close()
    return Check(name, "ok", "accepts this server's certificate")
