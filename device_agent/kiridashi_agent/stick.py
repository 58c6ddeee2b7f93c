"""Reading a memory stick: the server's answers from a folder or one file, believed no more than those of a network.

Nothing is unpacked and no name on the stick becomes a path: the device asks for names that it made itself. Of a folder,
symbolic links are not followed and only regular files are read; of a file, only what its plain ustar headers say. Every
read is bounded. What is read is checked by TUF and by the manifest's digests, as always.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from kiridashi.errors import InputError, NetworkError
from kiridashi.manifest import CHUNK_BYTES
from kiridashi.messages import MAX_MESSAGE_BYTES, Desired, Reported, Request
from kiridashi.stick import INDEX_NAME, MAX_INDEX_BYTES, StickIndex, decode_index, place_of

from kiridashi_agent.transport import NotFoundError

_BLOCK = 512
_MAX_ENTRIES = 10_000
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block


class Source(Protocol):
    """The files of a stick by their names inside it."""

    def read(self, name: str, offset: int, limit: int) -> bytes | None:
        """At most ``limit`` bytes from ``offset``; ``None`` if there is no such regular file."""
        ...


class FolderSource:
    """A folder; ``root`` is an open descriptor of it."""

    def __init__(self, root: int) -> None:
        self._root = root

    def read(self, name: str, offset: int, limit: int) -> bytes | None:
        """See :meth:`Source.read`."""
        with ExitStack() as stack:
            place = self._root
            *folders, last = name.split("/")
            try:
                for folder in folders:
                    place = os.open(folder, _FOLDER_FLAGS, dir_fd=place)
                    stack.callback(os.close, place)
                file = os.open(last, _FILE_FLAGS, dir_fd=place)
            except FileNotFoundError:
                return None
            stack.callback(os.close, file)
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            return _pread(file, offset, limit)


class FileSource:
    """One ustar file; ``file`` is an open descriptor of it.

    Raises:
        InputError: it is not a plain ustar archive: links, devices, extensions, a name twice, or cut short.
    """

    def __init__(self, file: int, path: Path) -> None:
        self._file = file
        self._entries = dict(self._scan(path))

    def read(self, name: str, offset: int, limit: int) -> bytes | None:
        """See :meth:`Source.read`."""
        if name not in self._entries:
            return None
        begin, size = self._entries[name]
        return _pread(self._file, begin + offset, max(0, min(limit, size - offset)))

    def _scan(self, path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name, offset and size of every file; sources: POSIX.1-2017, pax, "ustar Interchange Format"."""
        end, offset, seen = os.fstat(self._file).st_size, 0, set[str]()
        while (header := os.pread(self._file, _BLOCK, offset)) and header.strip(b"\0"):
            try:
                name, size, kind = _text(header[:100]), int(_text(header[124:136]) or "0", 8), header[156:157]
                prefix = _text(header[345:500])
            except ValueError as error:
                raise _no_stick(path, f"a damaged header at byte {offset}") from error
            name = f"{prefix}/{name}" if prefix else name
            if header[257:262] != b"ustar" or kind not in (b"0", b"5"):
                raise _no_stick(path, f"'{name[:80]}' is not a plain file")
            if name in seen or len(seen) >= _MAX_ENTRIES or size < 0 or offset + _BLOCK + size > end:
                raise _no_stick(path, f"'{name[:80]}' is there twice, is cut short, or is one too many")
            seen.add(name)
            if kind == b"0":
                yield name, (offset + _BLOCK, size)
            offset += _BLOCK + -(-size // _BLOCK) * _BLOCK


class StickTransport:
    """A :class:`~kiridashi_agent.transport.Transport` over a stick: it answers, wants nothing, and takes no reports.

    What was done is in the journal, so an agent with a connection reports it.
    """

    def __init__(self, source: Source, path: Path) -> None:
        self._source = source
        self._path = path

    def index(self) -> StickIndex:
        """What the stick says it carries.

        Raises:
            InputError: it has no index, or one that cannot be read.
            NetworkError: the stick cannot be read.
        """
        data = self._read(INDEX_NAME, 0, MAX_INDEX_BYTES)
        if data is None:
            raise _no_stick(self._path, f"it has no {INDEX_NAME}")
        return decode_index(data, f"{INDEX_NAME} of {self._path}")

    def request_many(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        """See :meth:`kiridashi_agent.transport.Requests.request_many`."""
        for request in requests:
            is_chunk = request.method == "chunk"
            offset, limit = (request.index * CHUNK_BYTES, CHUNK_BYTES) if is_chunk else (0, MAX_MESSAGE_BYTES)
            name = place_of(request)
            data = self._read(name, offset, limit)
            if data is None or (is_chunk and not data):
                raise NotFoundError(f"{self._path} does not hold '{name}'")
            yield request, data

    def publish_state(self, reported: Reported) -> None:
        """Nobody to tell."""

    def publish_event(self, name: str, body: Mapping[str, Any]) -> None:
        """Nobody to tell."""

    def next_desired(self, timeout_s: float) -> Desired | None:
        """A stick wants nothing."""
        return None

    def _read(self, name: str, offset: int, limit: int) -> bytes | None:
        try:
            return self._source.read(name, offset, limit)
        except OSError as error:
            raise NetworkError(
                f"'{name}' on {self._path} cannot be read",
                why=str(error),
                next_step="put the stick in again, then run the same command: it goes on where it stopped",
            ) from error


@contextmanager
def opened(path: Path) -> Iterator[StickTransport]:
    """The stick at ``path``, a folder or a file, for the time of a ``with`` block.

    Raises:
        InputError: there is nothing, or it is not a stick.
    """
    with ExitStack() as stack:
        yield StickTransport(_source(path, stack), path)


def _source(path: Path, stack: ExitStack) -> Source:
    try:
        if path.is_dir():
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, root)
            return FolderSource(root)
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, file)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _no_stick(path, "it is neither a folder nor a file")
        return FileSource(file, path)
    except OSError as error:
        raise _no_stick(path, str(error)) from error


def _pread(file: int, offset: int, limit: int) -> bytes:
    pieces = []
    while limit > 0 and (piece := os.pread(file, limit, offset)):
        pieces.append(piece)
        offset, limit = offset + len(piece), limit - len(piece)
    return b"".join(pieces)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].strip(b" ").decode("ascii")


def _no_stick(path: Path, why: str) -> InputError:
    step = "write it on the server: kiridashi fleet export-usb LINE FOLDER"
    return InputError(f"{path} is not a stick of Kiridashi's", why=why, next_step=step)
