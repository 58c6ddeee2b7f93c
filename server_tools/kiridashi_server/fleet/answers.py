"""What a device gets for a request. Pure: rules over four read-only views, no connection and no clock.

Least privilege: a device reads the repository's own metadata, and of the lines only those it serves: their
delegated metadata, their manifests, and the artifacts of their releases. What exists beyond that is not
told; a blob that the device may not read and one that does not exist get the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kiridashi.errors import InputError
from kiridashi.messages import ReplyStatus, Request, decode

from kiridashi_server.fleet.published import METADATA_NAME, TARGET_NAME
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
        """Whether an artifact belongs to a release of one of them."""


def respond(payload: bytes, device: str, files: Files, blobs: Blobs, authorisation: Authorisation) -> Reply:
    """Decode a request's payload and answer it; a payload that is no request is answered with ``error``."""
    try:
        request = decode(payload, Request)
    except InputError as error:
        return Reply("error", str(error)[:400].encode())
    return answer(request, device, files, blobs, authorisation)


def answer(request: Request, device: str, files: Files, blobs: Blobs, authorisation: Authorisation) -> Reply:
    """Answer one request of a device whose name is known from the topic, not from the request."""
    match request.method:
        case "metadata":
            reply = _metadata(request.name, device, files, authorisation)
        case "target":
            reply = _target(request.name, device, files, authorisation)
        case "chunk":
            reply = _chunk(request, device, blobs, authorisation)
    if len(reply.payload) > MAX_FILE_BYTES:
        return Reply("error", b"the answer does not fit into one message")
    return reply


def _metadata(name: str, device: str, files: Files, authorisation: Authorisation) -> Reply:
    match = METADATA_NAME.fullmatch(name)
    if match is None:
        return Reply("refused", b"that is not the name of a metadata file")
    if match["line"] is not None and match["line"] not in authorisation.lines_of(device):
        return Reply("refused", b"this device does not serve that line")
    return _found(files.read_metadata(name), "metadata file")


def _target(path: str, device: str, files: Files, authorisation: Authorisation) -> Reply:
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


def _found(data: bytes | None, what: str) -> Reply:
    return Reply("ok", data) if data is not None else Reply("not-found", f"there is no such {what}".encode())
