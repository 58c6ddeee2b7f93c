"""Artifacts by content: a file's name is its SHA-256, so what is read can only be what was asked for."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from kiridashi.artifacts import iter_chunks, sync_folder
from kiridashi.errors import BundleError
from kiridashi.manifest import CHUNK_BYTES, MAX_ARTIFACT_BYTES

_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_CHUNK_INDEX = MAX_ARTIFACT_BYTES // CHUNK_BYTES


class BlobStore:
    """A folder of immutable files, ``<first two digits>/<sha256>``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would lie.

        Raises:
            BundleError: not 64 lower-case hexadecimal digits.
        """
        if not _SHA256.fullmatch(sha256):
            raise BundleError(f"'{sha256[:80]}' is not a SHA-256 digest")
        return self._folder / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob is there, whole."""
        return self.path(sha256).is_file()

    def add(self, source: Path, sha256: str) -> bool:
        """Copy a file in, checking its digest on the way; ``False`` if the blob was there already.

        The blob appears under its name only when it is complete, checked and synced.

        Raises:
            BundleError: the file's content has another digest; the store is unchanged.
        """
        place = self.path(sha256)
        if place.is_file():
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=".incoming.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in iter_chunks(source):
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != sha256:
                raise BundleError(
                    f"{source} is not the file with the digest {sha256[:16]}…",
                    why=f"its SHA-256 is {digest.hexdigest()[:16]}…: it was changed or damaged",
                    next_step="export the bundle again",
                )
            temporary.replace(place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(place.parent)
        return True

    def read_chunk(self, sha256: str, index: int) -> bytes | None:
        """The ``index``-th 256 KiB piece of a blob; ``None`` if the blob or the piece does not exist."""
        if not 0 <= index < MAX_CHUNK_INDEX or not self.has(sha256):
            return None
        with self.path(sha256).open("rb") as file:
            file.seek(index * CHUNK_BYTES)
            return file.read(CHUNK_BYTES) or None
