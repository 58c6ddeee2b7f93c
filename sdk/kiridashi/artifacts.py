"""Files as content-addressed chunks, and writes that survive a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kiridashi.errors import BundleError
from kiridashi.manifest import CHUNK_BYTES, Artifact, ArtifactKind, Manifest, decode_manifest

MANIFEST_NAME = "manifest.json"
_TEMPORARY = ".tmp"
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


def iter_chunks(path: Path) -> Iterator[bytes]:
    """The file's consecutive 256 KiB pieces; the last one may be shorter."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read piece by piece."""
    whole = hashlib.sha256()
    for piece in iter_chunks(path):
        whole.update(piece)
    return whole.hexdigest()


def describe_file(path: Path, kind: ArtifactKind) -> Artifact:
    """The manifest entry for a file: size, digest, chunk digests (parity and patches are added by who knows them)."""
    whole, chunks, size = hashlib.sha256(), [], 0
    for piece in iter_chunks(path):
        whole.update(piece)
        chunks.append(hashlib.sha256(piece).hexdigest())
        size += len(piece)
    return Artifact(name=path.name, kind=kind, bytes=size, sha256=whole.hexdigest(), chunks=tuple(chunks))


def read_bundle(folder: Path) -> Manifest:
    """Read a bundle folder and check every file against the manifest.

    Raises:
        BundleError: no manifest, a missing file, or one whose size or digest differs.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle", why=f"it has no {MANIFEST_NAME}")
    manifest = decode_manifest(path.read_bytes(), str(path))
    for artifact in manifest.artifacts:
        check_file(folder / artifact.name, artifact)
    return manifest


def check_file(path: Path, artifact: Artifact) -> None:
    """Compare a file with its manifest entry.

    Raises:
        BundleError: the file is missing, or its size or digest differs.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing", next_step="fetch or export the bundle again")
    if path.stat().st_size != artifact.bytes or sha256_file(path) != artifact.sha256:
        raise BundleError(
            f"{path} is not the file that the manifest lists",
            why="its size or SHA-256 differs: it was changed or damaged",
            next_step="fetch or export the bundle again",
        )


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a whole file so that after a crash either the old or the new content stands, never a mixture.

    The data is written to a temporary file beside it, synced, renamed over ``path``, and the folder synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk says so without the file's name
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what :func:`write_atomic` left of ``name`` (or of any file) when it was killed; for the only writer."""
    for path in folder.glob(f".{name}*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def is_shortage(error: OSError) -> bool:
    """Whether the system lacked something just then, which tells nothing of the file: no reason to set it aside."""
    return error.errno in _SHORTAGES


def aside(path: Path) -> Path:
    """Where :func:`set_aside` puts a file."""
    return path.with_name(path.name + ".damaged")


def set_aside(path: Path) -> None:
    """Move what cannot be used, file or folder, out of the way; what was set aside before goes."""
    place = aside(path)
    remove(place)
    path.replace(place)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file: nothing is cut off, and a link in its place is not followed. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
