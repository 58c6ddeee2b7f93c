"""Records as one signed file: the same records and the same key give the same bytes.

An archive is a zip without compression. ``manifest.json`` lists records and arrays with their SHA-256,
``signature.json`` has an Ed25519 signature (RFC 8032) over the manifest, ``blobs/<sha256>`` are the arrays. A reader
trusts nothing before it has checked the signature with a key that it was given by other means. Then the manifest says
which members there may be and how large; nothing is compressed, so an archive never unpacks to more than it is.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from kiridashi.errors import InputError, TrustError

from kiridashi_server.bank.record import Kind, Policy, Provenance, Record, decode_descriptor, decode_scores, record_id
from kiridashi_server.bank.rows import RecordSummary, record_of, row_of

FORMAT = "kiridashi-bank/1"
MANIFEST, SIGNATURE, BLOBS = "manifest.json", "signature.json", "blobs/"
MAX_ARCHIVE_BYTES = 16 * 1024**3
_MAX_MANIFEST_BYTES = 128 * 1024**2
_MAX_SIGNATURE_BYTES = 4096
_MAX_BLOB_BYTES = 256 * 1024**2
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CONTEXT = b"kiridashi bank archive 1\n"


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record without its arrays; the fields are those of :class:`~kiridashi_server.bank.record.Record`."""

    id: str
    task: str
    labels: tuple[str, ...]
    backbone_fingerprint: str
    layout_digest: str
    samples: int
    outcomes: dict[str, float]
    provenance: Provenance
    policy: Policy
    kind: Kind
    created: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record in a manifest, and the SHA-256 of its arrays by kind."""

    row: Row
    blobs: dict[str, str]


class ArchiveManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an archive holds: records by id, and sizes in bytes of their arrays by SHA-256."""

    format: str
    records: tuple[Entry, ...]
    sizes: dict[str, int]


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Public key and signature, both hex."""

    key: str
    signature: str


@dataclass(frozen=True)
class Archive:
    """An archive whose signature, members and sizes have been checked; :meth:`entries` checks the records.

    Attributes:
        path: the file.
        manifest: signed content.
        signer: hex of the public key that signed it.
    """

    path: Path
    manifest: ArchiveManifest
    signer: str

    def entries(self) -> Iterator[tuple[Record, dict[str, bytes]]]:
        """Records with their arrays as stored, one at a time, each checked: digests, identity, contents.

        An imported record is ``internal``, whatever it was where it came from, and its origin names the signer.

        Raises:
            TrustError: an array is not what was signed.
            InputError: a record is malformed.
        """
        with zipfile.ZipFile(self.path) as archive:
            for entry in self.manifest.records:
                blobs = {kind: self._blob(archive, sha256) for kind, sha256 in entry.blobs.items()}
                yield _record(entry, blobs, self.signer), blobs

    def _blob(self, archive: zipfile.ZipFile, sha256: str) -> bytes:
        try:
            data = archive.read(BLOBS + sha256)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise _altered(self.path, str(error)) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _altered(self.path, f"the array {sha256[:12]} has another SHA-256")
        return data


def write_archive(
    path: Path,
    records: Sequence[tuple[RecordSummary, Mapping[str, str]]],
    read: Callable[[str], bytes],
    key: Ed25519PrivateKey,
) -> None:
    """Write records into ``path``, which must not be a file that others read meanwhile.

    Args:
        path: where; callers rename it into place.
        records: in any order, with the SHA-256 of their stored arrays by kind.
        read: a stored array, checked.
        key: signs.

    Raises:
        InputError: a record's policy does not allow it.
    """
    kept = [record.task for record, _ in records if record.policy != "shareable"]
    if kept:
        raise InputError(
            f"{len(kept)} of {len(records)} records are internal: {', '.join(sorted(kept)[:5])}",
            why="only records whose policy is shareable leave the bank",
            next_step="kiridashi bank policy RECORD shareable, or name others with --record",
        )
    entries = tuple(
        Entry(msgspec.convert(row_of(record), Row), dict(digests))
        for record, digests in sorted(records, key=lambda pair: pair[0].id)
    )
    blobs = sorted({sha256 for entry in entries for sha256 in entry.blobs.values()})
    sizes = {sha256: len(read(sha256)) for sha256 in blobs}
    manifest = msgspec.json.encode(ArchiveManifest(FORMAT, entries, sizes), order="sorted")
    signature = Signature(public_hex(key.public_key()), key.sign(_CONTEXT + manifest).hex())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_member(MANIFEST), manifest)
        archive.writestr(_member(SIGNATURE), msgspec.json.encode(signature, order="sorted"))
        for sha256 in blobs:
            archive.writestr(_member(BLOBS + sha256), read(sha256))


def read_archive(path: Path, trusted: Sequence[Ed25519PublicKey]) -> Archive:
    """Check everything about an archive but its records, which :meth:`Archive.entries` does.

    Args:
        path: the file.
        trusted: keys of signers whose records may enter the bank.

    Raises:
        InputError: the file cannot be read, or is no archive of this version.
        TrustError: unsigned, signed by a key that is not trusted, altered, or larger than it may be.
    """
    try:
        size = path.stat().st_size
        if size > MAX_ARCHIVE_BYTES:
            raise TrustError(f"{path} has {size:,} bytes", why=f"an archive has at most {MAX_ARCHIVE_BYTES:,}")
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            content = archive.read(_limited(path, members, MANIFEST, _MAX_MANIFEST_BYTES))
            signature = archive.read(_limited(path, members, SIGNATURE, _MAX_SIGNATURE_BYTES))
    except OSError as error:
        raise InputError(f"{path} cannot be read", why=error.strerror or str(error)) from error
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, UnicodeDecodeError) as error:
        raise TrustError(f"{path} is no archive of a bank", why=str(error)) from error
    signer = _check_signature(path, content, signature, trusted)
    manifest = _decode(path, content)
    _check_members(path, manifest, members)
    return Archive(path, manifest, signer)


def public_hex(key: Ed25519PublicKey) -> str:
    """The public key's 32 bytes as hex."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3
    info.external_attr = 0o100644 << 16
    return info


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise _altered(path, "two members have the same name")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise _altered(path, f"'{info.filename[:80]}' is compressed or encrypted, which no archive is")
    return members


def _limited(path: Path, members: Mapping[str, zipfile.ZipInfo], name: str, limit: int) -> zipfile.ZipInfo:
    if name not in members:
        raise TrustError(f"{path} is not a signed archive of a bank", why=f"it has no {name}")
    if members[name].file_size > limit:
        raise _altered(path, f"{name} has {members[name].file_size:,} bytes, {limit:,} are allowed")
    return members[name]


def _check_signature(path: Path, content: bytes, signature: bytes, trusted: Sequence[Ed25519PublicKey]) -> str:
    try:
        found = msgspec.json.decode(signature, type=Signature)
        key = next((key for key in trusted if public_hex(key) == found.key), None)
        if key is None:
            raise TrustError(
                f"{path} is signed by a key that is not trusted, {found.key[:16]}",
                why="none of the keys given with --trust is this one",
                next_step="ask who made it for the public key, over a way you trust, and pass it with --trust",
            )
        key.verify(bytes.fromhex(found.signature), _CONTEXT + content)
    except (msgspec.MsgspecError, InvalidSignature, ValueError) as error:
        raise _altered(path, f"the signature does not hold: {error or type(error).__name__}") from error
    return found.key


def _decode(path: Path, content: bytes) -> ArchiveManifest:
    try:
        manifest = msgspec.json.decode(content, type=ArchiveManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"the manifest of {path} cannot be read", why=str(error)) from error
    if manifest.format != FORMAT:
        raise InputError(
            f"{path} has the format '{manifest.format}', this program reads '{FORMAT}'",
            next_step="use the version of kiridashi that wrote it, or a newer one",
        )
    return manifest


def _check_members(path: Path, manifest: ArchiveManifest, members: Mapping[str, zipfile.ZipInfo]) -> None:
    wanted = {BLOBS + sha256: size for sha256, size in manifest.sizes.items()}
    found = {name: info.file_size for name, info in members.items() if name not in (MANIFEST, SIGNATURE)}
    if extra := sorted(set(found) - set(wanted)):
        raise _altered(path, f"it holds '{extra[0][:80]}', which was not signed")
    if found != wanted or max(wanted.values(), default=0) > _MAX_BLOB_BYTES:
        raise _altered(path, "arrays are missing, or of another size than was signed")


def _record(entry: Entry, blobs: Mapping[str, bytes], signer: str) -> Record:
    origin = f"imported, signed by {signer[:16]}"
    row = msgspec.to_builtins(entry.row)
    earlier = row["provenance"]["origin"]
    row |= {
        "policy": "internal",
        "provenance": row["provenance"] | {"origin": f"{origin}; {earlier}" if earlier else origin},
    }
    try:
        scores, taylor = decode_scores(blobs["scores"]), decode_scores(blobs["taylor"])
        record = record_of(row, scores, taylor, decode_descriptor(blobs.get("descriptor")))
        if not blobs.keys() <= {"scores", "taylor", "descriptor"}:
            raise ValueError("it has arrays of an unknown kind")
        if not scores or record_id(record, entry.blobs) != record.id:
            raise ValueError("it has no scores, or its id is not that of its contents")
    except (KeyError, ValueError, InputError) as error:
        raise InputError(
            f"the record of '{entry.row.task}' in the archive is malformed", why=f"{type(error).__name__}: {error}"
        ) from error
    return record


def _altered(path: Path, why: str) -> TrustError:
    return TrustError(
        f"{path} is not what was signed", why=why, next_step="get the archive again; nothing of it was used"
    )
