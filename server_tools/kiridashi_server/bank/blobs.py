"""A content-addressed store: a file is called by the SHA-256 of its bytes, so a changed file gives itself away."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from kiridashi.artifacts import sync_folder, write_atomic

from kiridashi_server.bank.errors import BankDamagedError


class BlobStore:
    """Blobs in ``folder/ab/abcdef…``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes) -> str:
        """Store ``data`` durably and return its digest. A blob that is there already, intact, is not written again."""
        digest = hashlib.sha256(data).hexdigest()
        if not self.is_intact(digest):
            write_atomic(self._path(digest), data)
        return digest

    def get(self, digest: str) -> bytes:
        """The blob's bytes, checked.

        Raises:
            BankDamagedError: it is missing, or its bytes have changed.
        """
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BankDamagedError(f"{path} is missing", why="the bank lists it") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise BankDamagedError(f"{path} has changed", why="its bytes no longer have the SHA-256 it is named by")
        return data

    def is_intact(self, digest: str) -> bool:
        """Whether the blob is there and its bytes are its own."""
        path = self._path(digest)
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest

    def delete(self, digest: str) -> None:
        """Remove the blob durably; one that is not there is no error."""
        path = self._path(digest)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)

    def digests(self) -> Iterator[str]:
        """Digests of all blobs that are there; files of interrupted writes are not blobs."""
        for path in sorted(self._folder.glob("??/*")):
            if not path.name.startswith("."):
                yield path.name

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest
