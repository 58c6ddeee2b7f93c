"""Records out of a bank into a signed file, out of a file into a bank, and over to a backbone with new weights."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from kiridashi.artifacts import sync_folder
from kiridashi.errors import InputError

from kiridashi_server.bank.archive import read_archive, write_archive
from kiridashi_server.bank.record import Record
from kiridashi_server.bank.rows import RecordSummary
from kiridashi_server.bank.store import Bank


@dataclass(frozen=True)
class Imported:
    """What an import did: ids of new and of known records, the signer, and new records by backbone fingerprint."""

    new: tuple[str, ...]
    known: tuple[str, ...]
    signer: str
    backbones: dict[str, int]


def export_records(bank: Bank, path: Path, key: Ed25519PrivateKey, keys: Sequence[str] = ()) -> tuple[str, ...]:
    """Write records into a signed archive, whole or not at all. Returns their ids.

    Args:
        bank: where they are.
        path: the archive.
        key: signs.
        keys: ids, beginnings of ids or task names; by default all records whose policy is shareable.

    Raises:
        InputError: there is nothing to export, a named record's policy is internal, or the file cannot be written.
        UnknownRecordError: a key names no record, or several.
        BankDamagedError: an array is missing or changed.
    """
    if keys:
        records = {record.id: record for record in map(bank.summary, keys)}
    else:
        records = {record.id: record for record in bank.summaries() if record.policy == "shareable"}
    if not records:
        raise InputError(
            f"no record of the bank in {bank.folder} may be exported",
            why="none has the policy shareable",
            next_step="kiridashi bank policy RECORD shareable",
        )
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise InputError(f"{path} cannot be written", why=error.strerror or str(error)) from error
    draft = Path(name)
    try:
        write_archive(draft, [(record, bank.digests_of(name)) for name, record in records.items()], bank.blob, key)
        draft.chmod(0o644)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return tuple(sorted(records))


def import_records(bank: Bank, path: Path, trusted: Sequence[Ed25519PublicKey]) -> Imported:
    """Take over the records of an archive, all or none; those that the bank has stay as they are.

    Raises:
        InputError: the file cannot be read or a record is malformed.
        TrustError: unsigned, signed by an unknown key, altered, or too large; nothing was changed.
    """
    archive = read_archive(path, trusted)
    for _ in archive.entries():  # every record is checked before the first is stored
        pass
    is_new = bank.add_all(archive.entries())
    taken = list(zip([entry.row for entry in archive.manifest.records], is_new, strict=True))
    return Imported(
        new=tuple(row.id for row, new in taken if new),
        known=tuple(row.id for row, new in taken if not new),
        signer=archive.signer,
        backbones=dict(Counter(row.backbone_fingerprint for row, new in taken if new)),
    )


@dataclass(frozen=True)
class Carried:
    """What was carried over: ids of the new records, of those that the bank had, and records left where they are."""

    new: tuple[str, ...]
    known: tuple[str, ...]
    left: tuple[RecordSummary, ...]


def carry_records(bank: Bank, fingerprint: str, layout_digest: str, *, source: str | None = None) -> Carried:
    """Copy records of other backbones with the same layout over to this backbone, whose weights have changed.

    Scores name units, so they keep their meaning as far as the units keep theirs, which is for the caller to judge.
    Heads, feature moments and measured outcomes belong to the old weights and are not taken along. The old records
    stay.

    Args:
        bank: gets the copies.
        fingerprint: the backbone in use.
        layout_digest: its layout.
        source: take records of backbones whose fingerprint begins so; by default of all others.

    Raises:
        InputError: no record of another backbone can be carried over; the message names what to learn again.
    """
    others = [
        one
        for one in bank.summaries()
        if one.backbone_fingerprint != fingerprint and one.backbone_fingerprint.startswith(source or "")
    ]
    fitting = [one for one in others if one.layout_digest == layout_digest]
    left = tuple(one for one in others if one.layout_digest != layout_digest)
    if not fitting:
        tasks = sorted({one.task for one in left})
        raise InputError(
            "no record can be carried over to this backbone",
            why=f"its layout differs from that of {', '.join(tasks)}: there are other units"
            if tasks
            else "the bank has no record of another backbone" + (f" that begins with {source}" if source else ""),
            next_step="kiridashi bank learn " + " ".join(f"--task {task}" for task in tasks) if tasks else "",
        )
    new: list[str] = []
    known: list[str] = []
    for one in fitting:
        record = _carried(bank.get(one.id), fingerprint)
        (new if bank.add(record) else known).append(record.id)
    return Carried(tuple(new), tuple(known), left)


def _carried(record: Record, fingerprint: str) -> Record:
    origin = f"carried over from {record.backbone_fingerprint}"
    earlier = record.provenance.origin
    return dataclasses.replace(
        record,
        backbone_fingerprint=fingerprint,
        head_weight=None,
        head_bias=None,
        feature_mean=None,
        feature_variance=None,
        outcomes={},
        provenance=dataclasses.replace(record.provenance, origin=f"{origin}; {earlier}" if earlier else origin),
    )
