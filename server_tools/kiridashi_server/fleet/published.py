"""What the TUF repository has published: names on the wire, files on disk, and the one consistent reading of them.

Nothing here signs or writes, so what answers devices needs no key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kiridashi.errors import StateError, TrustError
from kiridashi.messages import check_name
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

_NAME = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NUMBER = "[1-9][0-9]{0,8}"
_SHA256 = "[0-9a-f]{64}"
PROBES_ROLE = "probes"
METADATA_NAME = re.compile(
    rf"(?:timestamp|{_NUMBER}\.(?:root|snapshot|targets|(?P<probes>{PROBES_ROLE})|line-(?P<line>{_NAME})))\.json"
)
TARGET_NAME = re.compile(rf"lines/(?P<line>{_NAME})/(?:(?P<digest>{_SHA256})\.)?(?P<version>{_NUMBER})\.json")
PROBES_NAME = re.compile(rf"probes/(?:(?P<digest>{_SHA256})\.)?(?P<probes>{_SHA256})\.json")
SignedPart = TypeVar("SignedPart", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Committed:
    """The metadata that ``timestamp.json`` names, read and checked.

    ``lines`` is keyed by line name; ``probes`` is the role of the probe sets, ``None`` before the first one.
    """

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]
    lines: dict[str, Metadata[Targets]]
    probes: Metadata[Targets] | None = None

    @property
    def delegated(self) -> dict[str, Metadata[Targets]]:
        """Every delegated role by its name."""
        lines = {line_role(line): metadata for line, metadata in self.lines.items()}
        return lines if self.probes is None else {**lines, PROBES_ROLE: self.probes}


def line_role(line: str) -> str:
    """Name of the delegated role that signs a line's targets."""
    return f"line-{check_name(line, 'line')}"


class Published:
    """The files of one repository folder: ``metadata/`` and ``targets/``."""

    def __init__(self, folder: Path) -> None:
        self.metadata_folder = folder / "metadata"
        self.targets_folder = folder / "targets"

    def root_bytes(self) -> bytes:
        """The newest root metadata, which a device pins at enrolment."""
        return self._read(f"{self._newest_root_version()}.root.json")

    def committed(self) -> Committed:
        """Everything that is published now.

        Raises:
            StateError: a file is missing or unreadable.
            TrustError: a file is not signed by the key that its delegation names.
        """
        root = self._parse(f"{self._newest_root_version()}.root.json", Root)
        timestamp = self._parse("timestamp.json", Timestamp)
        snapshot = self._parse(f"{timestamp.signed.snapshot_meta.version}.snapshot.json", Snapshot)
        versions = {name.removesuffix(".json"): meta.version for name, meta in snapshot.signed.meta.items()}
        targets = self._parse(f"{versions['targets']}.targets.json", Targets)
        top: tuple[tuple[str, Metadata[Timestamp] | Metadata[Snapshot] | Metadata[Targets]], ...]
        top = (("timestamp", timestamp), ("snapshot", snapshot), ("targets", targets))
        delegated = {
            role: self._parse(f"{version}.{role}.json", Targets)
            for role, version in versions.items()
            if role != "targets"
        }
        probes = delegated.pop(PROBES_ROLE, None)
        lines = {role.removeprefix("line-"): metadata for role, metadata in delegated.items()}
        state = Committed(root, timestamp, snapshot, targets, lines, probes)
        try:
            root.verify_delegate("root", root)
            for role, metadata in top:
                root.verify_delegate(role, metadata)
            for role, metadata in state.delegated.items():
                targets.verify_delegate(role, metadata)
        except RepositoryError as error:
            raise TrustError(
                f"the repository {self.metadata_folder} does not verify",
                why=str(error),
                next_step="restore the folder from its backup; nothing was signed",
            ) from error
        return state

    def read_metadata(self, name: str) -> bytes | None:
        """A metadata file by its name on the wire (``timestamp.json``, ``3.targets.json``), or ``None``."""
        if not METADATA_NAME.fullmatch(name):
            return None
        path = self.metadata_folder / name
        return path.read_bytes() if path.is_file() else None

    def read_target(self, path: str) -> bytes | None:
        """A manifest or probe set by target path, with or without a consistent snapshot's digest prefix, or ``None``.

        Without a prefix the published metadata decides which bytes are meant, never the folder's content.
        """
        match = TARGET_NAME.fullmatch(path) or PROBES_NAME.fullmatch(path)
        if not match:
            return None
        if match["digest"] is None:
            state = self.committed()
            role = state.lines.get(match["line"]) if "line" in match.groupdict() else state.probes
            target = role.signed.targets.get(path) if role else None
            if target is None:
                return None
            parent, _, name = path.rpartition("/")
            path = f"{parent}/{target.hashes['sha256']}.{name}"
        file = self.targets_folder / path
        return file.read_bytes() if file.is_file() else None

    def _newest_root_version(self) -> int:
        versions = [int(path.name.split(".")[0]) for path in self.metadata_folder.glob("*.root.json")]
        if not versions:
            raise StateError(f"there is no repository in {self.metadata_folder}", next_step="kiridashi fleet init")
        return max(versions)

    def _parse(self, name: str, kind: type[SignedPart]) -> Metadata[SignedPart]:
        try:
            metadata = Metadata[SignedPart].from_bytes(self._read(name))
        except RepositoryError as error:
            raise StateError(f"{self.metadata_folder / name} is damaged", why=str(error)) from error
        if not isinstance(metadata.signed, kind):
            raise StateError(f"{self.metadata_folder / name} is damaged", why=f"it is not {kind.type} metadata")
        return metadata

    def _read(self, name: str) -> bytes:
        try:
            return (self.metadata_folder / name).read_bytes()
        except OSError as error:
            raise StateError(
                f"the repository file {name} cannot be read",
                why=str(error),
                next_step="restore the state folder from its backup",
            ) from error


def version_of(path: str) -> int:
    """The version number in a target path."""
    return int(path.rpartition("/")[2].removesuffix(".json"))
