"""The TUF repository: what is published, signed so that devices can check it without trusting the way it came.

Roles follow the TUF specification 1.0 (python-tuf's Metadata API): root, targets, snapshot, timestamp, and delegated
roles with a key of their own each: one for each line, which may only sign targets below ``lines/<line>/``, and one for
probe sets, below ``probes/``.

``timestamp.json`` is the commit: it names the snapshot, which names everything else, and it is replaced
atomically and last. Files of a write that was cut short are named by nothing; the next write replaces them.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError, StateError
from kiridashi.messages import MAX_MESSAGE_BYTES, probes_path, target_path
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from kiridashi_server.fleet.keys import SigningKeys
from kiridashi_server.fleet.published import (
    PROBES_ROLE,
    Committed,
    Published,
    SignedPart,
    line_role,
    version_of,
)

# Every file travels in one MQTT message; the rest of the message's limit is for its header.
MAX_FILE_BYTES = MAX_MESSAGE_BYTES - 4096


@dataclass(frozen=True)
class Expiry:
    """How long each role's signature holds. Snapshot and timestamp are renewed by the running server."""

    root: timedelta = timedelta(days=730)
    targets: timedelta = timedelta(days=365)
    line: timedelta = timedelta(days=365)
    snapshot: timedelta = timedelta(days=30)
    timestamp: timedelta = timedelta(days=3)

    def of(self, role: str) -> timedelta:
        """The life of a role's signature; every delegated role has the life of ``line``."""
        lives = {
            "root": self.root,
            "targets": self.targets,
            "snapshot": self.snapshot,
            "timestamp": self.timestamp,
        }
        return lives.get(role, self.line)


class Repository:
    """One TUF repository folder (``metadata/`` and ``targets/``) and its signing keys.

    Writers of several processes take turns by a lock file; readers need none.
    """

    def __init__(self, folder: Path, keys: SigningKeys, expiry: Expiry | None = None) -> None:
        self.published = Published(folder)
        self._lock_path = folder / ".lock"
        self._keys = keys
        self._expiry = expiry or Expiry()

    def init(self, now: datetime) -> None:
        """Create keys and the first version of the four top-level roles; a repository that is there is kept."""
        self.published.metadata_folder.mkdir(parents=True, exist_ok=True)
        with self._writing():
            if (self.published.metadata_folder / "timestamp.json").is_file():
                return
            root = Root(version=1, expires=now + self._expiry.root, consistent_snapshot=True)
            signers = {role: self._keys.create(role) for role in ("root", "targets", "snapshot", "timestamp")}
            for role, signer in signers.items():
                root.add_key(signer.public_key, role)
            first = Metadata(root)
            first.sign(signers["root"])
            self._write("1.root.json", first.to_bytes())
            empty = Committed(
                first,
                _unborn(Timestamp()),
                _unborn(Snapshot(meta={})),
                _unborn(Targets(delegations=Delegations({}, {}))),
                {},
            )
            self._commit(empty, {"targets": empty.targets}, now)

    def add_line(self, line: str, now: datetime) -> None:
        """Delegate ``lines/<line>/*`` to a new key; a line that is there is left as it is."""
        role = line_role(line)
        with self._writing():
            state = self.published.committed()
            if line not in state.lines:
                fresh = self._delegate(state, role, f"lines/{line}/*")
                self._commit(state, {"targets": state.targets, role: fresh}, now)

    def check_publishable(self, line: str, version: int, manifest_bytes: bytes) -> None:
        """Refuse what :meth:`publish_target` would refuse, without changing anything.

        Raises:
            InputError: an unknown line, a version that is not newer than the newest, the same version with other
                bytes, or a manifest that does not fit into one message.
        """
        self._already_published(self.published.committed(), line, version, manifest_bytes)

    def publish_target(self, line: str, version: int, manifest_bytes: bytes, now: datetime) -> str:
        """Sign a manifest as a target of its line and return the target path.

        Publishing the same bytes again is fine and changes nothing.

        Raises:
            InputError: as :meth:`check_publishable`.
            StateError, TrustError: the repository or a key is missing or damaged.
        """
        path = target_path(line, version)
        with self._writing():
            state = self.published.committed()
            if self._already_published(state, line, version, manifest_bytes):
                return path
            target = TargetFile.from_data(path, manifest_bytes, ["sha256"])
            role = state.lines[line]
            role.signed.targets[path] = target
            write_atomic(
                self.published.targets_folder / f"lines/{line}/{target.hashes['sha256']}.{version}.json", manifest_bytes
            )
            self._commit(state, {line_role(line): role}, now)
        return path

    def publish_probes(self, data: bytes, now: datetime) -> str:
        """Sign a probe set as a target and return its path, which is its digest's; the role is made for the first one.

        Publishing it again is fine and changes nothing. Nothing else can ever take its path.

        Raises:
            InputError: the probe set does not fit into one message.
            StateError, TrustError: the repository or a key is missing or damaged.
        """
        if len(data) > MAX_FILE_BYTES:
            raise InputError(
                f"the probe set has {len(data)} bytes without its files",
                why=f"it must fit into one message: at most {MAX_FILE_BYTES} bytes",
                next_step="make a smaller probe set",
            )
        digest = hashlib.sha256(data).hexdigest()
        path = probes_path(digest)
        with self._writing():
            state = self.published.committed()
            if state.probes is not None and path in state.probes.signed.targets:
                return path
            role, changed = state.probes, {}
            if role is None:
                role = self._delegate(state, PROBES_ROLE, f"{PROBES_ROLE}/*")
                changed["targets"] = state.targets
            role.signed.targets[path] = TargetFile.from_data(path, data, ["sha256"])
            write_atomic(self.published.targets_folder / f"{PROBES_ROLE}/{digest}.{digest}.json", data)
            self._commit(state, {**changed, PROBES_ROLE: role}, now)
        return path

    def withdraw_probes(self, digest: str, now: datetime) -> None:
        """No longer sign a probe set; one that is not signed stays so.

        Raises:
            StateError, TrustError: the repository or a key is missing or damaged.
        """
        with self._writing():
            state = self.published.committed()
            role = state.probes
            if role is not None and role.signed.targets.pop(probes_path(digest), None) is not None:
                self._commit(state, {PROBES_ROLE: role}, now)

    def refresh_timestamp(self, now: datetime) -> tuple[str, ...]:
        """Renew every signature whose half life is over, and return the renewed roles.

        Root is never renewed here (see :meth:`rotate_root_key`); targets and delegated roles only when their key is
        here.
        """
        with self._writing():
            state = self.published.committed()
            candidates = {"targets": state.targets, **state.delegated}
            due = {
                role: metadata
                for role, metadata in candidates.items()
                if self._is_due(role, metadata.signed.expires, now) and self._has_key(state, role)
            }
            if due or self._is_due("snapshot", state.snapshot.signed.expires, now):
                self._commit(state, due, now)
                return (*due, "snapshot", "timestamp")
            if self._is_due("timestamp", state.timestamp.signed.expires, now):
                self._write("timestamp.json", self._seal(state, "timestamp", state.timestamp, now))
                return ("timestamp",)
        return ()

    def sign_for_stick(self, line: str, now: datetime, life: timedelta) -> tuple[bytes, datetime]:
        """A timestamp that is believed for ``life``, for a stick that is carried; and until when the stick holds.

        Signatures of ``line`` that would end before are renewed first, where their key is here. The repository's own
        timestamp goes on one version later, so that a device which saw the stick takes the next network update.

        Raises:
            InputError: an unknown line.
            StateError, TrustError: the repository or a key is missing or damaged.
        """
        with self._writing():
            state = self.published.committed()
            if line not in state.lines:
                raise InputError(f"there is no line '{line}'", next_step="kiridashi line list")
            roles = {"targets": state.targets, line_role(line): state.lines[line]}
            due = {
                role: metadata
                for role, metadata in roles.items()
                if metadata.signed.expires < now + life and self._has_key(state, role)
            }
            self._commit(state, due, now)
            carried = self._seal(state, "timestamp", state.timestamp, now, life)
            top = (state.root.signed.expires, state.timestamp.signed.expires, state.snapshot.signed.expires)
            until = min(*top, *(metadata.signed.expires for metadata in roles.values()))
            self._write("timestamp.json", self._seal(state, "timestamp", state.timestamp, now))
        return carried, until

    def rotate_root_key(self, now: datetime) -> int:
        """Replace the root key and renew root; the new version is signed by the old and the new key.

        Returns the new root version. The old key is deleted once the new root stands.
        """
        with self._writing():
            root = self.published.committed().root
            old_ids = list(root.signed.roles["root"].keyids)
            old = self._keys.signer("root", old_ids)
            new = self._keys.create("root")
            for keyid in old_ids:
                root.signed.revoke_key(keyid, "root")
            root.signed.add_key(new.public_key, "root")
            root.signed.version += 1
            root.signed.expires = now + self._expiry.root
            root.sign(old)
            root.sign(new, append=True)
            self._write(f"{root.signed.version}.root.json", root.to_bytes())
            for keyid in old_ids:
                self._keys.remove("root", keyid)
            return root.signed.version

    def _delegate(self, state: Committed, role: str, paths: str) -> Metadata[Targets]:
        """Give ``paths`` to a new key in ``state.targets``; returns the role's metadata, to be committed with it."""
        delegations = state.targets.signed.delegations
        if delegations is None or delegations.roles is None:
            raise StateError(f"the repository {self.published.metadata_folder} was made without delegations")
        key = self._keys.create(role).public_key
        delegations.keys[key.keyid] = key
        delegations.roles[role] = DelegatedRole(role, [key.keyid], 1, terminating=True, paths=[paths])
        return _unborn(Targets())

    def _already_published(self, state: Committed, line: str, version: int, data: bytes) -> bool:
        if line not in state.lines:
            raise InputError(
                f"there is no line '{line}'",
                why=f"known lines: {', '.join(sorted(state.lines)) or 'none'}",
                next_step=f"kiridashi line add {line}",
            )
        if not 1 <= version <= 999_999_999:
            raise InputError(f"{version} is not a version number", why="versions are whole numbers from 1 to 999999999")
        if len(data) > MAX_FILE_BYTES:
            raise InputError(
                f"the manifest of line '{line}' version {version} has {len(data)} bytes",
                why=f"it must fit into one message: at most {MAX_FILE_BYTES} bytes",
            )
        targets = state.lines[line].signed.targets
        newest = max((version_of(path) for path in targets), default=0)
        there = targets.get(target_path(line, version))
        if there is not None and there.hashes["sha256"] == hashlib.sha256(data).hexdigest():
            return True
        if version <= newest:
            reason = "is published with other content" if there else "is older than what is published"
            raise InputError(
                f"version {version} of line '{line}' {reason}",
                why=f"the newest version is {newest}, and versions only grow",
                next_step=f"export the bundle as version {newest + 1} or later",
            )
        return False

    def _commit(self, state: Committed, changed: dict[str, Metadata[Targets]], now: datetime) -> None:
        """Write new versions of ``changed``, then snapshot, then timestamp: only the last write publishes."""
        files = {
            f"{metadata.signed.version}.{role}.json": data
            for role, metadata in changed.items()
            for data in [self._seal(state, role, metadata, now)]
        }
        for name, data in files.items():
            number, role, _ = name.split(".")
            state.snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(int(number), data, ["sha256"])
        snapshot = self._seal(state, "snapshot", state.snapshot, now)
        version = state.snapshot.signed.version
        state.timestamp.signed.snapshot_meta = MetaFile.from_data(version, snapshot, ["sha256"])
        files[f"{version}.snapshot.json"] = snapshot
        files["timestamp.json"] = self._seal(state, "timestamp", state.timestamp, now)
        for name, data in files.items():
            if len(data) > MAX_FILE_BYTES:
                raise InputError(
                    f"the metadata file {name} would grow to {len(data)} bytes",
                    why=f"it must fit into one message: at most {MAX_FILE_BYTES} bytes",
                    next_step="retire old versions or lines; nothing was changed",
                )
        for name, data in files.items():
            self._write(name, data)

    def _seal(
        self,
        state: Committed,
        role: str,
        metadata: Metadata[SignedPart],
        now: datetime,
        life: timedelta | None = None,
    ) -> bytes:
        metadata.signed.version += 1
        metadata.signed.expires = now + (self._expiry.of(role) if life is None else life)
        metadata.sign(self._keys.signer(role, self._keyids(state, role)))
        return metadata.to_bytes()

    def _keyids(self, state: Committed, role: str) -> list[str]:
        if role in state.root.signed.roles:
            return list(state.root.signed.roles[role].keyids)
        return list(state.targets.signed.get_delegated_role(role).keyids)

    def _has_key(self, state: Committed, role: str) -> bool:
        return self._keys.has(role, self._keyids(state, role))

    def _is_due(self, role: str, expires: datetime, now: datetime) -> bool:
        return expires - now <= self._expiry.of(role) / 2

    def _write(self, name: str, data: bytes) -> None:
        write_atomic(self.published.metadata_folder / name, data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _unborn(signed: SignedPart) -> Metadata[SignedPart]:
    """Metadata before its first version: signing counts up."""
    signed.version = 0
    return Metadata(signed)
