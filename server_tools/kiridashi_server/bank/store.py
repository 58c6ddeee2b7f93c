"""The bank on disk: a database of records and a content-addressed store of their arrays, in one folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, delete, insert, or_, select

from kiridashi_server.bank.blobs import BlobStore
from kiridashi_server.bank.database import open_database
from kiridashi_server.bank.errors import BankDamagedError, UnknownRecordError
from kiridashi_server.bank.record import BLOB_KINDS, Provenance, Record, decode_arrays, encode_arrays
from kiridashi_server.bank.tables import record_blobs, records

DATABASE_NAME = "bank.db"


@dataclass(frozen=True)
class Fault:
    """A stored array that is missing or changed."""

    record_id: str
    task: str
    kind: str
    what: str


@dataclass(frozen=True)
class Inspection:
    """What :meth:`Bank.verify` found: how much it checked, faults, and leftovers it has removed."""

    records: int
    blobs: int
    faults: tuple[Fault, ...]
    leftovers_removed: int


class Bank:
    """Records of past tasks. Use it as a context manager, or call :meth:`close`.

    Writers of several processes take turns; a crash leaves either the old or the new state (and at most a blob that
    nothing uses, which :meth:`verify` and :meth:`remove` clear away).
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder = folder
        self._engine = engine
        self._blobs = BlobStore(folder / "blobs")

    @classmethod
    def open(cls, folder: Path | str, *, create: bool = True) -> Bank:
        """Open the bank in ``folder``.

        Raises:
            UnknownRecordError: there is no bank in the folder, and ``create`` is off.
            BankDamagedError: its database cannot be read.
        """
        folder = Path(folder)
        if not create and not (folder / DATABASE_NAME).is_file():
            raise UnknownRecordError(
                f"there is no bank in {folder}", next_step="make one: kiridashi bank learn --bank DIR --task DIR"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankDamagedError(f"{folder} cannot be made a bank", why=str(error)) from error
        return cls(folder, open_database(folder / DATABASE_NAME))

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the database's connections."""
        self._engine.dispose()

    def add(self, record: Record) -> bool:
        """Store a record; False if the bank has it already, which changes nothing."""
        blobs = encode_arrays(record)
        with self._engine.begin() as connection:
            # Inside the write lock, so that no other process clears the new blobs away as leftovers.
            digests = {kind: self._blobs.put(data) for kind, data in blobs.items()}
            if connection.execute(select(records.c.id).where(records.c.id == record.id)).first():
                return False
            connection.execute(insert(records).values(**_row(record)))
            rows = [{"record_id": record.id, "kind": kind, "sha256": sha} for kind, sha in digests.items()]
            connection.execute(insert(record_blobs), rows)
        return True

    def get(self, key: str) -> Record:
        """The record with this id, a unique beginning of it, or this task name (if only one has it).

        Raises:
            UnknownRecordError: none or several.
            BankDamagedError: one of its arrays is missing or changed.
        """
        with self._engine.begin() as connection:
            return self._load(connection, self._find(connection, key))

    def list(self, *, backbone_fingerprint: str | None = None) -> tuple[Record, ...]:
        """All records (of one backbone), by task name, then id.

        Raises:
            BankDamagedError: an array is missing or changed; the message names the record.
        """
        query = select(records).order_by(records.c.task, records.c.id)
        if backbone_fingerprint is not None:
            query = query.where(records.c.backbone_fingerprint == backbone_fingerprint)
        with self._engine.begin() as connection:
            rows = connection.execute(query).mappings().all()
            return tuple(self._load(connection, row) for row in rows)

    def remove(self, key: str) -> str:
        """Forget a record: its row and every array that no other record uses. Returns its id.

        Raises:
            UnknownRecordError: no record, or several.
        """
        with self._engine.begin() as connection:
            record_id = str(self._find(connection, key)["id"])
            connection.execute(delete(record_blobs).where(record_blobs.c.record_id == record_id))
            connection.execute(delete(records).where(records.c.id == record_id))
        # Only after the row is gone for good: a crash in between leaves a leftover, never a record without arrays.
        self._clear_leftovers()
        return record_id

    def verify(self) -> Inspection:
        """Check every array of every record, and clear away what no record uses."""
        faults: list[Fault] = []
        query = select(record_blobs, records.c.task).join(records, records.c.id == record_blobs.c.record_id)
        with self._engine.begin() as connection:
            rows = connection.execute(query.order_by(records.c.task, record_blobs.c.kind)).mappings().all()
            count = len(connection.execute(select(records.c.id)).all())
            for row in rows:
                try:
                    self._blobs.get(row["sha256"])
                except BankDamagedError as error:
                    faults.append(Fault(row["record_id"], row["task"], row["kind"], str(error)))
        return Inspection(count, len({row["sha256"] for row in rows}), tuple(faults), self._clear_leftovers())

    def _clear_leftovers(self) -> int:
        with self._engine.begin() as connection:
            used = set(connection.execute(select(record_blobs.c.sha256)).scalars())
            unused = [digest for digest in self._blobs.digests() if digest not in used]
            for digest in unused:
                self._blobs.delete(digest)
        return len(unused)

    def _find(self, connection: Connection, key: str) -> RowMapping:
        matches = or_(records.c.task == key, records.c.id.startswith(key, autoescape=True))
        found = connection.execute(select(records).where(matches)).mappings().all() if key else []
        if len(found) == 1:
            return found[0]
        tasks = connection.execute(select(records.c.task).order_by(records.c.task)).scalars().all()
        if not found:
            raise UnknownRecordError(
                f"the bank in {self.folder} has no record '{key}'",
                why=f"it has {_listed(tasks)}",
                next_step="kiridashi bank list",
            )
        raise UnknownRecordError(
            f"'{key}' means {len(found)} records",
            why=", ".join(row["id"][:12] for row in found),
            next_step="give the beginning of one of these ids",
        )

    def _load(self, connection: Connection, row: RowMapping) -> Record:
        query = select(record_blobs.c.kind, record_blobs.c.sha256).where(record_blobs.c.record_id == row["id"])
        digests = {str(blob.kind): str(blob.sha256) for blob in connection.execute(query)}
        try:
            record = _record(row, {kind: self._blobs.get(digests[kind]) for kind in BLOB_KINDS})
        except (BankDamagedError, KeyError, ValueError) as error:
            raise BankDamagedError(
                f"the record of '{row['task']}' ({row['id'][:12]}) is damaged",
                why=str(error),
                next_step=f"kiridashi bank forget {row['id'][:12]}, then learn the task again: kiridashi bank learn",
            ) from error
        return record


def _row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "task": record.task,
        "labels": list(record.labels),
        "backbone_fingerprint": record.backbone_fingerprint,
        "layout_digest": record.layout_digest,
        "samples": record.samples,
        "outcomes": dict(record.outcomes),
        "provenance": dataclasses.asdict(record.provenance),
        "policy": record.policy,
        "created": record.created,
    }


def _record(row: RowMapping, blobs: dict[str, bytes]) -> Record:
    return Record(
        task=row["task"],
        labels=tuple(row["labels"]),
        backbone_fingerprint=row["backbone_fingerprint"],
        layout_digest=row["layout_digest"],
        samples=row["samples"],
        outcomes=row["outcomes"],
        provenance=Provenance(**row["provenance"]),
        policy=row["policy"],
        created=row["created"],
        **decode_arrays(blobs),
    )


def _listed(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if tasks else "no record at all"
