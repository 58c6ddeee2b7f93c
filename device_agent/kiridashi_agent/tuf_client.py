"""The TUF client (The Update Framework specification 1.0, section 5): python-tuf over the agent's transport."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kiridashi.artifacts import sweep
from kiridashi.errors import BundleError, KiridashiError, StateError, TrustError
from kiridashi.manifest import MAX_MANIFEST_BYTES
from kiridashi.messages import Request
from tuf.api import exceptions
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from kiridashi_agent.transport import NotFoundError

_METADATA_URL, _TARGET_URL = "metadata:", "target:"
_MAX_ROOT_ROTATIONS = 64


def fetch_target(folder: Path, root: bytes, ask: Callable[[Request], bytes], target: str) -> bytes:
    """Refresh the metadata in ``folder`` from the pinned ``root`` on, and return the verified bytes of ``target``.

    ``ask`` gets one file from the server, or raises ``NotFoundError``.

    Raises:
        TrustError: metadata or target failed a check; the message says which.
        BundleError: the target is signed, but too large for a manifest.
        StateError: the folder cannot be written.
        NetworkError: no connection or no answer; nothing is known about the target then.
    """
    staging = folder / "incoming-target"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        updater = Updater(
            str(folder),
            _METADATA_URL,
            target_base_url=_TARGET_URL,
            fetcher=_AskingFetcher(ask),
            config=UpdaterConfig(max_root_rotations=_MAX_ROOT_ROTATIONS),
            bootstrap=root,
        )
        updater.refresh()
        info = updater.get_targetinfo(target)
        if info is None:
            raise _not_signed(target)
        if info.length > MAX_MANIFEST_BYTES:
            raise BundleError(f"the manifest {target} has {info.length} bytes", why="no real manifest is that large")
        updater.download_target(info, str(staging))
        return staging.read_bytes()
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        raise explain(error, target) from error
    except OSError as error:
        raise StateError(f"the metadata folder {folder} cannot be used", why=str(error)) from error
    finally:
        staging.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove temporary files of a process that was killed: python-tuf's, by Python's own names for them, and ours."""
    sweep(folder)
    for path in folder.glob(f"{tempfile.gettempprefix()}????????"):
        path.unlink(missing_ok=True)


class _AskingFetcher(FetcherInterface):
    """python-tuf's download interface over the agent's requests."""

    def __init__(self, ask: Callable[[Request], bytes]) -> None:
        self._ask = ask

    def _fetch(self, url: str) -> Iterator[bytes]:
        base, _, name = url.partition("/")
        request = Request(method="metadata" if base == _METADATA_URL else "target", name=name)
        try:
            # Not a generator: an error must be raised now, where fetch() can tell a missing file from a lost one.
            return iter((self._ask(request),))
        except NotFoundError as error:
            raise exceptions.DownloadHTTPError(str(error), 404) from error


def explain(error: Exception, target: str) -> KiridashiError:
    """The typed error for what python-tuf raised: what was refused, why, and what to do.

    An error of our own that python-tuf wrapped (no connection, say) is returned as it was.
    """
    cause = error.__cause__
    if isinstance(cause, KiridashiError):
        return cause
    kept = "the model in use keeps serving"
    table: tuple[tuple[type[Exception], str, str], ...] = (
        (
            exceptions.BadVersionNumberError,
            "older metadata than this device has already seen was refused (rollback)",
            f"find out who serves old files; {kept}. An older model is published as a new version",
        ),
        (
            exceptions.ExpiredMetadataError,
            "expired metadata was refused",
            f"check the device's clock, and that the fleet server runs and renews its timestamp; {kept}",
        ),
        (
            exceptions.UnsignedMetadataError,
            "metadata without enough valid signatures was refused",
            f"it was changed on the way, or signed with other keys than the pinned ones; {kept}",
        ),
        (
            exceptions.LengthOrHashMismatchError,
            "a file that differs from its signed digest was refused",
            f"it was changed on the way or at the server; {kept}. Publish the bundle again",
        ),
        (
            exceptions.DownloadLengthMismatchError,
            "a file longer than its signed length was refused",
            f"the server sends more data than was signed; {kept}",
        ),
    )
    for kind, what, next_step in table:
        if isinstance(error, kind):
            return TrustError(f"{target}: {what}", why=str(error), next_step=next_step)
    return TrustError(f"{target}: the metadata was refused", why=str(error), next_step=kept)


def _not_signed(target: str) -> TrustError:
    return TrustError(
        f"{target} was refused",
        why="no signed metadata lists it",
        next_step="publish the bundle first (kiridashi publish), or correct the desired state",
    )
