"""The plant server: one state folder with the authority, the repository, the store, the registry and the broker.

Layout of the folder::

    server.json             settings; written last, so a folder without it was never completed
    ca/                     the certificate authority (private)
    tls/                    certificates and keys of the broker and of the server itself (private)
    keys/                   signing keys of the TUF roles (private)
    repository/             TUF metadata, manifests and probe sets
    store/                  artifacts by digest
    registry.sqlite         devices, lines, releases, profiles (unless settings name another database)
    broker/                 configuration, log and data of a broker that this server runs itself
    mosquitto/              configuration for a broker that the plant's IT runs
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from uuid import uuid4

import msgspec
from kiridashi.artifacts import MANIFEST_NAME, read_bundle, write_atomic
from kiridashi.enrolment import EnrolRequest, EnrolTicket
from kiridashi.errors import BundleError, InputError, StateError
from kiridashi.probes import ProbeSet
from kiridashi.stick import StickIndex

from kiridashi_server.fleet import enrolment, profiling
from kiridashi_server.fleet.authority import Authority
from kiridashi_server.fleet.broker import LOOPBACK, Broker, BrokerKind
from kiridashi_server.fleet.connection import BrokerAddress, ClientFiles
from kiridashi_server.fleet.database import stamp
from kiridashi_server.fleet.distribution import Distribution
from kiridashi_server.fleet.keys import SigningKeys, private_folder
from kiridashi_server.fleet.mosquitto import MosquittoSettings, write_mosquitto_config
from kiridashi_server.fleet.records import Profile, ProfileRequest, PublishedProbes, Release
from kiridashi_server.fleet.registry import Registry
from kiridashi_server.fleet.repository import Expiry, Repository
from kiridashi_server.fleet.stick import MAX_LIFE, write_stick
from kiridashi_server.fleet.store import BlobStore

Clock = Callable[[], datetime]
DEFAULT_BROKER = BrokerAddress("127.0.0.1", 8883)
DEFAULT_SECONDS = 600.0


def utc_now() -> datetime:
    """The present, in UTC."""
    return datetime.now(UTC)


class Settings(msgspec.Struct, frozen=True):
    """What ``server.json`` holds.

    Attributes:
        plant: name that stands in the authority's certificate.
        broker_host: host under which devices reach the broker; stands in its certificate.
        broker_port: TLS port of the broker.
        hosts: further names and addresses in the broker's certificate.
        instance: tells this server's connection from another server's on the same broker.
        database: SQLAlchemy URL; empty means ``registry.sqlite`` in the folder.
    """

    plant: str
    broker_host: str
    broker_port: int
    hosts: tuple[str, ...]
    instance: str
    database: str = ""


class PlantServer:
    """Everything the fleet side does, over one folder. Open it with :meth:`init` or :meth:`open`."""

    def __init__(self, folder: Path, settings: Settings, *, expiry: Expiry | None = None, now: Clock = utc_now) -> None:
        self.folder = folder
        self.settings = settings
        self.authority = Authority.open(folder / "ca")
        self.repository = Repository(folder / "repository", SigningKeys(folder / "keys"), expiry)
        self.store = BlobStore(folder / "store")
        self.registry = Registry(settings.database or f"sqlite:///{folder / 'registry.sqlite'}")
        self._now = now

    @classmethod
    def init(
        cls,
        folder: Path,
        broker: BrokerAddress | None = None,
        *,
        plant: str = "plant",
        hosts: Sequence[str] | None = None,
        database: str = "",
        expiry: Expiry | None = None,
        now: Clock = utc_now,
    ) -> PlantServer:
        """Create what is missing in ``folder`` and open it.

        On a folder that is complete, keys, devices and releases stay as they are, and so does every setting
        that is not given; another broker address or other hosts give the broker a new certificate.

        Raises:
            InputError: a port or host that cannot be.
            StateError: the folder is damaged.
        """
        folder = private_folder(folder.absolute())
        old = _read_settings(folder) if (folder / "server.json").is_file() else None
        before = BrokerAddress(old.broker_host, old.broker_port) if old else DEFAULT_BROKER
        address = broker or before
        if not 0 < address.port < 65536:
            raise InputError(f"{address.port} is not a TCP port")
        settings = Settings(
            plant=old.plant if old else plant,
            broker_host=address.host,
            broker_port=address.port,
            hosts=tuple(hosts) if hosts is not None else (old.hosts if old else ()),
            instance=old.instance if old else uuid4().hex[:12],
            database=database or (old.database if old else ""),
        )
        authority = Authority.init(folder / "ca", settings.plant, now())
        names = (settings.broker_host, *settings.hosts)
        complete = _broker_files(folder).certificate.is_file()
        if not complete or old is None or names != (old.broker_host, *old.hosts):
            authority.issue_broker(folder / "tls", names, now())
        if not (folder / "tls" / "server.pem").is_file():
            authority.issue_server(folder / "tls", now())
        Repository(folder / "repository", SigningKeys(folder / "keys"), expiry).init(now())
        place = MosquittoSettings(settings.broker_port, _broker_files(folder), Path("/var/lib/mosquitto"))
        write_mosquitto_config(folder / "mosquitto", place)
        write_atomic(folder / "server.json", msgspec.json.format(msgspec.json.encode(settings)) + b"\n")
        return cls(folder, settings, expiry=expiry, now=now)

    @classmethod
    def open(cls, folder: Path, *, expiry: Expiry | None = None, now: Clock = utc_now) -> PlantServer:
        """Open a folder that :meth:`init` completed.

        Raises:
            StateError: it is not one, or it is damaged.
        """
        folder = folder.absolute()
        return cls(folder, _read_settings(folder), expiry=expiry, now=now)

    def close(self) -> None:
        """Give back database connections."""
        self.registry.close()

    @property
    def broker_address(self) -> BrokerAddress:
        """Where devices and this server reach the broker."""
        return BrokerAddress(self.settings.broker_host, self.settings.broker_port)

    @property
    def client_files(self) -> ClientFiles:
        """With what this server connects to the broker."""
        tls = self.folder / "tls"
        return ClientFiles(self.folder / "ca" / "ca.pem", tls / "server.pem", tls / "server.key")

    @property
    def broker_files(self) -> ClientFiles:
        """What the broker listens with."""
        return _broker_files(self.folder)

    def add_line(self, line: str) -> bool:
        """Add a line with a signing key of its own; ``False`` if it was there.

        Raises:
            InputError: an unsafe name.
            StateError: the key of the role ``targets`` is not here.
        """
        self.repository.add_line(line, self._now())
        return self.registry.add_line(line, self._now())

    def publish(self, bundle: Path, line: str) -> Release:
        """Check a bundle whole, store its artifacts, and sign its manifest for a line.

        The signature comes after the artifacts: a device never sees a manifest whose artifacts are not there.
        Publishing the same bundle again is fine and completes what an interruption left undone.

        Raises:
            BundleError: a file of the bundle is missing or changed, or the bundle is for another line.
            InputError: an unknown line, or a version that is not newer than what is published.
        """
        manifest = read_bundle(bundle)
        if manifest.line != line:
            raise InputError(
                f"the bundle {bundle} is for line '{manifest.line}', not for '{line}'",
                next_step=f"kiridashi publish {bundle} --line {manifest.line}",
            )
        data = (bundle / MANIFEST_NAME).read_bytes()
        if data != manifest.encode():
            raise BundleError(
                f"the manifest of {bundle} is not in canonical form",
                why="it was edited, or written by another program; its digest would not be the model's",
                next_step="export the bundle again",
            )
        self.repository.check_publishable(line, manifest.version, data)
        for artifact in manifest.artifacts:
            self.store.add(bundle / artifact.name, artifact.sha256)
        now = self._now()
        target = self.repository.publish_target(line, manifest.version, data, now)
        release = Release(line, manifest.version, target, manifest.digest, now.isoformat(timespec="seconds"))
        return self.registry.add_release(release, [artifact.sha256 for artifact in manifest.artifacts])

    def enrol(self, request: EnrolRequest, lines: Sequence[str], *, replace: bool = False) -> EnrolTicket:
        """Make a device a member of the fleet; see :func:`kiridashi_server.fleet.enrolment.enrol`."""
        return enrolment.enrol(
            request,
            lines,
            authority=self.authority,
            registry=self.registry,
            tuf_root=self.repository.published.root_bytes(),
            broker=self.broker_address,
            now=self._now(),
            replace=replace,
        )

    def assign(self, device: str, lines: Sequence[str]) -> None:
        """Make ``lines`` the lines of a device; see :meth:`Registry.assign`."""
        self.registry.assign(device, lines, self._now())

    def set_desired(self, line: str, *, version: int | None = None, devices: Sequence[str] | None = None) -> int:
        """Want a published version (``None``: the newest) on some devices or on all of the line.

        Returns how many devices get a new desired state.

        Raises:
            InputError: the version is not published, or a device does not serve the line.
        """
        version = self._newest(line) if version is None else version
        return self.registry.want(line, version, self._now(), devices)

    def export_stick(
        self, line: str, out: Path, *, version: int | None = None, life: timedelta = MAX_LIFE
    ) -> StickIndex:
        """Write a published version (``None``: the newest) to a memory stick; see :func:`stick.write_stick`."""
        return write_stick(
            out,
            line,
            self._newest(line) if version is None else version,
            repository=self.repository,
            store=self.store,
            now=self._now().replace(microsecond=0),
            life=life,
        )

    def publish_probes(self, folder: Path, *, is_candidate: bool = False) -> PublishedProbes:
        """Sign a probe set, so that devices can be asked to measure it; see :func:`profiling.publish_probes`."""
        return profiling.publish_probes(
            folder, self.repository, self.store, self.registry, self._now(), is_candidate=is_candidate
        )

    def request_profile(
        self,
        devices: Sequence[str] = (),
        *,
        line: str | None = None,
        probes: str | None = None,
        seconds: float = DEFAULT_SECONDS,
        threads: int = 1,
    ) -> int:
        """Ask devices, and all of ``line``, for a profile; returns how many were asked anew.

        Args:
            devices: names.
            line: a line whose devices are asked too.
            probes: name or digest of a published probe set; the newest without.
            seconds: what measuring may take on a device.
            threads: inside one prediction.

        Raises:
            InputError: an unknown device or probe set, nobody to ask, or more seconds or threads than a device accepts.
        """
        serving = [device.name for device in self.registry.devices() if line in device.lines]
        digest = profiling.find_probes(self.registry, probes).digest
        now = self._now()
        wanted = ProfileRequest("", 0, digest, seconds, threads, stamp(now))
        published = self.repository.published
        return profiling.request_profile(self.registry, published, [*devices, *serving], wanted, now)

    def probe_set(self, digest: str) -> ProbeSet:
        """A published probe set by its digest; raises StateError when there is none."""
        return profiling.read_probes(self.repository.published, digest)

    def profiles(self, device_class: str | None = None) -> tuple[Profile, ...]:
        """What devices measured: the newest of each kind; see :meth:`ProfileBook.profiles`."""
        return self.registry.profiles.profiles(device_class)

    def start_broker(self, *, bind: str = LOOPBACK, port: int | None = None, kind: BrokerKind | None = None) -> Broker:
        """Start a broker of our own on the configured port; see :meth:`Broker.start`."""
        return Broker.start(
            self.folder / "broker",
            self.broker_files,
            port=self.settings.broker_port if port is None else port,
            bind=bind,
            kind=kind,
        )

    def _newest(self, line: str) -> int:
        releases = self.registry.releases(line)
        if not releases:
            raise InputError(
                f"nothing is published for line '{line}'",
                next_step=f"kiridashi publish BUNDLE --line {line}",
            )
        return releases[-1].version

    @contextmanager
    def connected(self) -> Iterator[Distribution]:
        """A distribution that is connected to the broker; the caller runs it.

        Raises:
            NetworkError: the broker cannot be used.
            StateError: another process serves this folder.
        """
        with (self.folder / "serve.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StateError(
                    f"another process serves {self.folder} already",
                    next_step="stop it first, or give the second server a folder of its own and a shared database",
                ) from error
            self.repository.refresh_timestamp(self._now())
            distribution = Distribution(self.registry, self.repository, self.store, now=self._now)
            try:
                distribution.connect(
                    self.broker_address, self.client_files, f"kiridashi-server-{self.settings.instance}"
                )
                yield distribution
            finally:
                distribution.close()

    @contextmanager
    def serving(self) -> Iterator[Thread]:
        """Serve devices in the background for the time of a ``with`` block; raises as :meth:`connected`."""
        with self.connected() as distribution, distribution.running() as thread:
            yield thread


def _read_settings(folder: Path) -> Settings:
    path = folder / "server.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except FileNotFoundError as error:
        raise StateError(
            f"there is no plant server in {folder}",
            why=f"{path} is missing",
            next_step=f"kiridashi fleet init --state {folder} --host HOST",
        ) from error
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"the settings {path} cannot be read", why=str(error)) from error


def _broker_files(folder: Path) -> ClientFiles:
    tls = folder / "tls"
    return ClientFiles(folder / "ca" / "ca.pem", tls / "broker.pem", tls / "broker.key")
