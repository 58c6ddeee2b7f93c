"""Fetching the files of a bundle or a probe set: a plan (pure), and carrying it out chunk by chunk.

Every chunk is checked against the signed manifest as it arrives and written at its place in ``<name>.part``. Which
chunks are there already is read from the content itself, never from a note beside it: after a power cut a note could
claim a chunk that the disk never got. So a killed download goes on where it stood, less at most one window.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kiridashi.artifacts import check_file, iter_chunks, sync_folder
from kiridashi.budget import MIB
from kiridashi.errors import BundleError, StateError, TrustError
from kiridashi.manifest import CHUNK_BYTES, Artifact, Manifest
from kiridashi.messages import Delivery, Request

from kiridashi_agent.transport import NotFoundError, Requests

PART = ".part"
_SYNC_EVERY = 16


@dataclass(frozen=True)
class Place:
    """Where a chunk with a known digest lies on this device."""

    path: Path
    offset: int
    bytes: int


@dataclass(frozen=True)
class FilePlan:
    """What is to be done for one file: chunk indices that are there, that lie elsewhere, and that must be fetched."""

    artifact: Artifact
    done: frozenset[int]
    copies: Mapping[int, Place]
    fetch: tuple[int, ...]

    @property
    def bytes_to_write(self) -> int:
        """Bytes that the file will still grow by on the disk."""
        return sum(_chunk_bytes(self.artifact, index) for index in (*self.copies, *self.fetch))


def plan_download(
    artifacts: Iterable[Artifact], have: Mapping[str, frozenset[int]], elsewhere: Mapping[str, Place]
) -> tuple[FilePlan, ...]:
    """Split every artifact's chunks into those at hand, those to copy, and those to fetch.

    Args:
        artifacts: the files that are wanted.
        have: per file name, the chunk indices whose content was found right in place.
        elsewhere: per chunk digest, a place on this device that should hold the same bytes.
    """
    plans = []
    for artifact in artifacts:
        done = have.get(artifact.name, frozenset())
        missing = [index for index in range(len(artifact.chunks)) if index not in done]
        copies = {index: elsewhere[artifact.chunks[index]] for index in missing if artifact.chunks[index] in elsewhere}
        fetch = tuple(index for index in missing if index not in copies)
        plans.append(FilePlan(artifact, done, copies, fetch))
    return tuple(plans)


def chunk_places(folder: Path, manifest: Manifest) -> dict[str, Place]:
    """Where a complete bundle's chunks lie, by digest."""
    places = {}
    for artifact in manifest.artifacts:
        path = folder / artifact.name
        if path.is_file() and path.stat().st_size == artifact.bytes:
            for index, digest in enumerate(artifact.chunks):
                places[digest] = Place(path, index * CHUNK_BYTES, _chunk_bytes(artifact, index))
    return places


def chunks_in_place(folder: Path, artifact: Artifact) -> frozenset[int]:
    """Indices of the chunks that a finished or half-written file already holds, found by digest."""
    for path in (folder / artifact.name, folder / (artifact.name + PART)):
        if path.is_file():
            digests = (hashlib.sha256(piece).hexdigest() for piece in iter_chunks(path))
            pairs = enumerate(zip(artifact.chunks, digests, strict=False))
            return frozenset(index for index, (wanted, found) in pairs if wanted == found)
    return frozenset()


def download(
    transport: Requests,
    folder: Path,
    artifacts: Iterable[Artifact],
    *,
    elsewhere: Mapping[str, Place],
    keep_free_bytes: int = 16 * MIB,
) -> Delivery:
    """Bring every artifact into ``folder``, complete and checked; calling it again goes on where it stopped.

    Raises:
        TrustError: a chunk is not what the signed manifest says; nothing of it was kept.
        StateError: the disk has too little room; nothing was fetched.
        BundleError: the server does not have a chunk, or the manifest contradicts itself.
        NetworkError: the connection was lost; what has arrived stays.
    """
    started = time.monotonic()
    wanted = tuple(artifacts)
    have = {artifact.name: chunks_in_place(folder, artifact) for artifact in wanted}
    plans = tuple(plan for plan in plan_download(wanted, have, elsewhere) if not _is_complete(folder, plan))
    check_room(folder, sum(plan.bytes_to_write for plan in plans), keep_free_bytes)
    with ExitStack() as stack:
        parts = {plan.artifact.name: stack.enter_context(_Part(folder, plan)) for plan in plans}
        missed = {name: part.copy_known() for name, part in parts.items()}
        to_fetch = {name: (*part.plan.fetch, *missed[name]) for name, part in parts.items()}
        fetched, chunks = _fetch(transport, parts, to_fetch)
    for part in parts.values():
        part.finish()
    sync_folder(folder)
    total = sum(len(artifact.chunks) for artifact in wanted)
    needed = sum(len(indices) for indices in to_fetch.values())
    return Delivery(bytes=fetched, chunks=chunks, resumed_chunks=total - needed, seconds=time.monotonic() - started)


class _Part:
    """One file being put together."""

    def __init__(self, folder: Path, plan: FilePlan) -> None:
        self.plan = plan
        self._final = folder / plan.artifact.name
        self._path = folder / (plan.artifact.name + PART)
        self._descriptor = -1
        self._unsynced = 0

    def __enter__(self) -> _Part:
        if self._final.is_file():
            self._final.replace(self._path)  # damaged: what is right of it is kept
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, self.plan.artifact.bytes)
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def copy_known(self) -> tuple[int, ...]:
        """Copy the chunks that lie elsewhere; returns those that turned out to be damaged there."""
        missed = []
        for index, place in self.plan.copies.items():
            with place.path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.bytes)
            if self.accepts(index, data):
                self.write(index, data)
            else:
                missed.append(index)
        return tuple(missed)

    def accepts(self, index: int, data: bytes) -> bool:
        """Whether ``data`` is the chunk that the manifest lists."""
        return hashlib.sha256(data).hexdigest() == self.plan.artifact.chunks[index]

    def write(self, index: int, data: bytes) -> None:
        """Put a checked chunk at its place; synced every few chunks, so that a power cut costs little."""
        os.pwrite(self._descriptor, data, index * CHUNK_BYTES)
        self._unsynced += 1
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def finish(self) -> None:
        """Check the whole file and give it its name."""
        check_file(self._path, self.plan.artifact)
        self._path.replace(self._final)


def _fetch(transport: Requests, parts: Mapping[str, _Part], to_fetch: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Fetch the missing chunks; two files with the same content share their chunks. Returns bytes and chunks."""
    takers: dict[tuple[str, int], list[_Part]] = {}
    for name, indices in to_fetch.items():
        for index in indices:
            takers.setdefault((parts[name].plan.artifact.sha256, index), []).append(parts[name])
    received = 0
    try:
        for request, data in transport.request_many(_requests(takers)):
            for part in takers[request.sha256, request.index]:
                if not part.accepts(request.index, data):
                    raise TrustError(
                        f"chunk {request.index} of '{part.plan.artifact.name}' was refused",
                        why="it differs from the signed digest: changed on the way or at the server",
                        next_step="publish the bundle or the probe set again, then try again",
                    )
                part.write(request.index, data)
            received += len(data)
    except NotFoundError as error:
        raise BundleError(
            "the server does not have a chunk of these files", why=str(error), next_step="publish them again"
        ) from error
    return received, len(takers)


def _requests(keys: Iterable[tuple[str, int]]) -> Iterator[Request]:
    return (Request(method="chunk", sha256=sha256, index=index) for sha256, index in keys)


def _is_complete(folder: Path, plan: FilePlan) -> bool:
    path = folder / plan.artifact.name
    return len(plan.done) == len(plan.artifact.chunks) and path.is_file() and path.stat().st_size == plan.artifact.bytes


def _chunk_bytes(artifact: Artifact, index: int) -> int:
    return min(CHUNK_BYTES, artifact.bytes - index * CHUNK_BYTES)


def check_room(folder: Path, needed_bytes: int, keep_free_bytes: int) -> None:
    """Refuse a write of ``needed_bytes`` that would leave less than ``keep_free_bytes`` on the folder's disk.

    Raises:
        StateError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes + keep_free_bytes > free:
        raise StateError(
            f"{folder} has too little room for this download",
            why=f"it needs {needed_bytes / MIB:.1f} MiB with {keep_free_bytes / MIB:.0f} MiB left free, "
            f"and has {free / MIB:.1f} MiB",
            next_step="make room on that disk, then try again",
        )
