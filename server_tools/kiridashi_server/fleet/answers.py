"""What a device gets for a request: rules over views of the plant, no connection and no clock.

Least privilege: a device reads the repository's own metadata, and of the lines only those it serves: their
delegated metadata, their manifests, and the artifacts of their releases. A probe set is read by those that are to
measure it, as long as they are. What exists beyond that is not told; a blob that the device may not read and one that
does not exist get the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kiridashi.errors import InputError
from kiridashi.messages import ReplyStatus, Request, decode

from kiridashi_server.fleet.published import METADATA_NAME, PROBES_NAME, TARGET_NAME
from kiridashi_server.fleet.repository import MAX_FILE_BYTES
from kiridashi_server.fleet.store import MAX_CHUNK_INDEX

_SHA256_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Reply:
    """The answer: raw bytes with the status ``ok``, a short text with any other."""

    status: ReplyStatus
    payload: bytes


class Files(Protocol):
    """What the TUF repository has published."""

    def read_metadata(self, name: str) -> bytes | None:
        """A metadata file, ``None`` if there is none."""

    def read_target(self, path: str) -> bytes | None:
        """A manifest, ``None`` if there is none."""


class Blobs(Protocol):
    """Artifacts by digest."""

    def read_chunk(self, sha256: str, index: int) -> bytes | None:
        """A 256 KiB piece of an artifact, ``None`` if there is none."""


class Authorisation(Protocol):
    """Who may read what."""

    def lines_of(self, device: str) -> frozenset[str]:
        """The lines that a device serves."""

    def may_read(self, device: str, sha256: str) -> bool:
        """Whether an artifact belongs to a release of one of them, or to the probe set that it is to measure."""

    def probes_of(self, device: str) -> str | None:
        """The digest of the probe set that a device is to measure."""


class Reports(Protocol):
    """Where reports go."""

    def take_report(self, device: str, number: int, data: bytes) -> None:
        """Keep the answer to request ``number``, or raise ``InputError`` with the reason why not."""


@dataclass(frozen=True)
class Plant:
    """What answers are made of."""

    files: Files
    blobs: Blobs
    authorisation: Authorisation
    reports: Reports


def respond(payload: bytes, device: str, plant: Plant) -> Reply:
    """Decode a request's payload and answer it; a payload that is no request is answered with ``error``."""
    try:
        request = decode(payload, Request)
    except InputError as error:
        return Reply("error", str(error)[:400].encode())
    return answer(request, device, plant)


def answer(request: Request, device: str, plant: Plant) -> Reply:
    """Answer one request of a device whose name is known from the topic, not from the request."""
    match request.method:
        case "metadata":
            reply = _metadata(request.name, device, plant.files, plant.authorisation)
        case "target":
            reply = _target(request.name, device, plant.files, plant.authorisation)
        case "chunk":
            reply = _chunk(request, device, plant.blobs, plant.authorisation)
        case "report":
            reply = _report(request, device, plant.reports)
    if len(reply.payload) > MAX_FILE_BYTES:
        return Reply("error", b"the answer does not fit into one message")
    return reply


def _metadata(name: str, device: str, files: Files, authorisation: Authorisation) -> Reply:
    match = METADATA_NAME.fullmatch(name)
    if match is None:
        return Reply("refused", b"that is not the name of a metadata file")
    if match["line"] is not None and match["line"] not in authorisation.lines_of(device):
        return Reply("refused", b"this device does not serve that line")
    if match["probes"] is not None and authorisation.probes_of(device) is None:
        return Reply("refused", b"this device is not asked for a profile")
    return _found(files.read_metadata(name), "metadata file")


def _target(path: str, device: str, files: Files, authorisation: Authorisation) -> Reply:
    probes = PROBES_NAME.fullmatch(path)
    if probes is not None:
        if authorisation.probes_of(device) != probes["probes"]:
            return Reply("refused", b"this device is not asked to measure that probe set")
        return _found(files.read_target(path), "target")
    match = TARGET_NAME.fullmatch(path)
    if match is None:
        return Reply("refused", b"that is not the path of a target")
    if match["line"] not in authorisation.lines_of(device):
        return Reply("refused", b"this device does not serve that line")
    return _found(files.read_target(path), "target")


def _chunk(request: Request, device: str, blobs: Blobs, authorisation: Authorisation) -> Reply:
    well_formed = len(request.sha256) == 64 and _SHA256_DIGITS.issuperset(request.sha256)
    if not well_formed or not 0 <= request.index < MAX_CHUNK_INDEX:
        return Reply("refused", b"that is not a digest and the index of a chunk")
    if not authorisation.may_read(device, request.sha256):
        return Reply("refused", b"this device may not read that artifact")
    return _found(blobs.read_chunk(request.sha256, request.index), "chunk")


def _report(request: Request, device: str, reports: Reports) -> Reply:
    try:
        reports.take_report(device, request.index, bytes(request.body))
    except InputError as error:
        return Reply("refused", str(error)[:400].encode())
    return Reply("ok", b"")


def _found(data: bytes | None, what: str) -> Reply:
    return Reply("ok", data) if data is not None else Reply("not-found", f"there is no such {what}".encode())
