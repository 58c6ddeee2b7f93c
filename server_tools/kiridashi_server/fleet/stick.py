"""Writing a line's bundle to a memory stick, for devices that no network reaches; see :mod:`kiridashi.stick`."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from kiridashi.artifacts import sync_folder, write_atomic
from kiridashi.errors import InputError, StateError
from kiridashi.manifest import decode_manifest
from kiridashi.messages import target_path
from kiridashi.stick import INDEX_NAME, StickIndex
from tuf.api.metadata import Metadata, Snapshot, Timestamp

from kiridashi_server.fleet.published import Published, line_role
from kiridashi_server.fleet.repository import Repository
from kiridashi_server.fleet.store import BlobStore

ARCHIVE_SUFFIX = ".tar"
MAX_LIFE = timedelta(days=30)
Content = tuple[str, bytes | Path]


def write_stick(
    out: Path, line: str, version: int, *, repository: Repository, store: BlobStore, now: datetime, life: timedelta
) -> StickIndex:
    """Write a published version into the folder ``out``, or into one file if its name ends with ``.tar``.

    Signed anew, so that it is believed for ``life`` on the way.

    Raises:
        InputError: an unknown line or version, a ``life`` above 30 days, or ``out`` cannot be used.
        StateError, TrustError: the repository, a key or a stored file is missing or damaged.
    """
    if not timedelta(0) < life <= MAX_LIFE:
        raise InputError(f"a stick cannot hold for {life.days} days", why=f"it may be 1 to {MAX_LIFE.days}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already", next_step="name a new file or an empty folder")
    path = target_path(line, version)
    manifest = repository.published.read_target(path)
    if manifest is None:
        raise InputError(f"version {version} of line '{line}' is not published", next_step="kiridashi line list")
    blobs = {artifact.sha256: store.path(artifact.sha256) for artifact in decode_manifest(manifest, path).artifacts}
    missing = [sha256 for sha256, place in blobs.items() if not place.is_file()]
    if missing:
        raise StateError(f"the store lacks the file {missing[0][:16]}… of {path}", next_step="publish the bundle again")
    timestamp, until = repository.sign_for_stick(line, now, life)
    index = StickIndex(
        line=line,
        target=path,
        written=now.isoformat(timespec="seconds"),
        valid_until=until.isoformat(timespec="seconds"),
    )
    contents = list(_metadata(repository.published, line, timestamp))
    contents.append((f"targets/lines/{line}/{hashlib.sha256(manifest).hexdigest()}.{version}.json", manifest))
    contents += [(f"blobs/{sha256}", place) for sha256, place in sorted(blobs.items())]
    contents.append((INDEX_NAME, index.encode()))  # last: a stick without it was never completed
    try:
        if out.suffix == ARCHIVE_SUFFIX:
            _write_archive(out, contents, now)
        else:
            _write_folder(out, contents)
    except OSError as error:
        raise InputError(f"{out} cannot be written", why=str(error), next_step="use another stick") from error
    return index


def _metadata(published: Published, line: str, timestamp: bytes) -> Iterator[Content]:
    """All roots, for devices that pinned an old one, and what the stick's own timestamp names."""
    for root in sorted(published.metadata_folder.glob("*.root.json")):
        yield f"metadata/{root.name}", root.read_bytes()
    yield "metadata/timestamp.json", timestamp
    version = Metadata[Timestamp].from_bytes(timestamp).signed.snapshot_meta.version
    data = (published.metadata_folder / f"{version}.snapshot.json").read_bytes()
    yield f"metadata/{version}.snapshot.json", data
    listed = Metadata[Snapshot].from_bytes(data).signed.meta
    for role in ("targets", line_role(line)):
        name = f"{listed[f'{role}.json'].version}.{role}.json"
        yield f"metadata/{name}", (published.metadata_folder / name).read_bytes()


def _write_folder(out: Path, contents: list[Content]) -> None:
    for name, content in contents:
        place = out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            write_atomic(place, content)
            continue
        with content.open("rb") as source, place.open("wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())  # a stick is pulled out early, and its index must not be there before the files
    for folder in (*(path for path in out.rglob("*") if path.is_dir()), out):
        sync_folder(folder)


def _write_archive(out: Path, contents: list[Content], now: datetime) -> None:
    """A plain ustar file: nothing else is read on a device."""
    draft = out.with_name(out.name + ".part")
    try:
        with draft.open("wb") as whole:
            with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for name, content in contents:
                    entry = tarfile.TarInfo(name)
                    entry.mtime = int(now.timestamp())
                    entry.size = len(content) if isinstance(content, bytes) else content.stat().st_size
                    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                        archive.addfile(entry, file)
            whole.flush()
            os.fsync(whole.fileno())
        draft.replace(out)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(out.parent)
