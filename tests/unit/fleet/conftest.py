"""A repository on disk, and a real TUF client that reads it through a fetcher under the tests' control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kiridashi_server.fleet.keys import SigningKeys
from kiridashi_server.fleet.published import Published
from kiridashi_server.fleet.repository import Repository
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater


class FolderFetcher(FetcherInterface):
    """Serves a repository folder as the responder would; ``replaced`` is what an attacker serves instead."""

    def __init__(self, published: Published) -> None:
        self.published = published
        self.replaced: dict[str, bytes] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        kind, _, name = url.partition(":/")
        read = self.published.read_metadata if kind == "metadata" else self.published.read_target
        data = self.replaced.get(name, read(name))
        if data is None:
            raise DownloadHTTPError(f"no {name}", 404)
        return iter((data,))


class TufDevice:
    """A device's metadata folder; every call is a fresh updater over it, as after a restart."""

    def __init__(self, folder: Path, root: bytes, fetcher: FolderFetcher) -> None:
        self.folder, self.root, self.fetcher = folder, root, fetcher
        folder.mkdir()

    def updater(self) -> Updater:
        return Updater(
            str(self.folder),
            "metadata:",
            target_base_url="target:",
            fetcher=self.fetcher,
            bootstrap=self.root,
        )

    def refresh(self) -> None:
        self.updater().refresh()

    def fetch(self, target: str) -> bytes | None:
        updater = self.updater()
        updater.refresh()
        info = updater.get_targetinfo(target)
        if info is None:
            return None
        path = self.folder / "fetched"
        updater.download_target(info, str(path))
        return path.read_bytes()


@pytest.fixture
def now() -> datetime:
    # The client's clock is the real one, so the repository's is too.
    return datetime.now(UTC)


@pytest.fixture
def repository(tmp_path: Path, now: datetime) -> Repository:
    """A repository with the lines ``press-3`` and ``weld-1`` and nothing published."""
    repository = Repository(tmp_path / "repository", SigningKeys(tmp_path / "keys"))
    repository.init(now)
    repository.add_line("press-3", now)
    repository.add_line("weld-1", now)
    return repository


@pytest.fixture
def fetcher(repository: Repository) -> FolderFetcher:
    return FolderFetcher(repository.published)


@pytest.fixture
def new_device(tmp_path: Path, repository: Repository, fetcher: FolderFetcher) -> Callable[[str], TufDevice]:
    """Makes devices that pin the root of the moment."""
    return lambda name: TufDevice(tmp_path / name, repository.published.root_bytes(), fetcher)


@pytest.fixture
def device(new_device: Callable[[str], TufDevice]) -> TufDevice:
    return new_device("device-a")
