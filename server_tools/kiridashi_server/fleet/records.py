"""What the registry knows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from kiridashi.messages import Reported
from kiridashi.probes import ProbeReport


@dataclass(frozen=True)
class Release:
    """One published version of a line. ``manifest_digest`` is ``sha256:<hex>``; ``published`` is ISO 8601 UTC."""

    line: str
    version: int
    target: str
    manifest_digest: str
    published: str


@dataclass(frozen=True)
class Line:
    """A production line. ``offered`` is the version that newly assigned devices get, ``None`` before the first."""

    name: str
    created: str
    offered: int | None


@dataclass(frozen=True)
class Identity:
    """How a device proves itself: the serial and the key digest of its certificate, and the key of its seals."""

    certificate_serial: str
    certificate_key_sha256: str
    seal_public_key_pem: str


@dataclass(frozen=True)
class Device:
    """One enrolled device.

    Attributes:
        name: the device's name, also the common name of its certificate.
        identity: its keys, public parts.
        enrolled: ISO 8601 UTC.
        lines: the lines it serves, each with the version wanted there (``None``: nothing yet).
        generation: number of the desired state; it only grows.
        sent_generation: the newest generation that the broker has acknowledged.
        online: as the broker last told; ``None`` if never seen.
        reported: what the device last said of itself, and ``reported_at`` when (ISO 8601 UTC).
    """

    name: str
    identity: Identity
    enrolled: str
    lines: dict[str, int | None]
    generation: int
    sent_generation: int
    online: bool | None
    reported: Reported | None
    reported_at: str | None


@dataclass(frozen=True)
class Event:
    """One entry of a device's history; ``payload`` is the text that came with it."""

    device: str
    kind: str
    at: str
    payload: str


@dataclass(frozen=True)
class PublishedProbes:
    """A probe set that devices can be asked to measure; ``bytes`` is the size of its files."""

    digest: str
    name: str
    backbone_fingerprint: str
    runtime: str
    graphs: int
    bytes: int
    published: str


@dataclass(frozen=True)
class ProfileRequest:
    """What a device was asked to measure last.

    Attributes:
        device: who was asked.
        number: grows with every request to this device.
        probes: digest of the probe set.
        seconds, threads: how it is to be measured.
        asked, answered: ISO 8601 UTC; ``None`` while there is no report.
    """

    device: str
    number: int
    probes: str
    seconds: float
    threads: int
    asked: str
    answered: str | None = None


@dataclass(frozen=True)
class Profile:
    """A report with what tells it from others.

    Of each device class, name of a probe set, backbone, runtime and thread count the newest counts.

    ``probe_set`` is the set's name, which tells input sizes apart; ``measured`` is when it arrived, ISO 8601 UTC.
    """

    device: str
    device_class: str
    probe_set: str
    backbone_fingerprint: str
    runtime: str
    threads: int
    measured: str
    report: ProbeReport
