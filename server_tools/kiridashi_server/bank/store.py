"""The bank on disk: a database of records and a content-addressed store of their arrays, in one folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kiridashi.errors import InputError
from sqlalchemy import Connection, Engine, RowMapping, delete, func, insert, select, update

from kiridashi_server.amp.scores import ScoreArray
from kiridashi_server.bank.blobs import BlobStore
from kiridashi_server.bank.database import open_database
from kiridashi_server.bank.errors import BankDamagedError, UnknownRecordError
from kiridashi_server.bank.queries import all_votes, digests_of, find_row, rows_of, votes_of
from kiridashi_server.bank.record import (
    Policy,
    Record,
    StoredScores,
    decode_descriptor,
    decode_scores,
    encode_arrays,
)
from kiridashi_server.bank.rows import RecordSummary, record_of, row_of, summary_of
from kiridashi_server.bank.stacks import STACK_FROM, StackCache
from kiridashi_server.bank.tables import record_blobs, records
from kiridashi_server.compose.stack import ScoreStack

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
    """What :meth:`Bank.verify` found: how much it checked, faults, and what it has removed.

    ``stacks_removed`` counts stacked scores that were damaged, or of a set of records that the bank no longer has;
    they are made again when they are needed.
    """

    records: int
    blobs: int
    faults: tuple[Fault, ...]
    leftovers_removed: int
    stacks_removed: int = 0


class Bank:
    """Records of past tasks. Use it as a context manager, or call :meth:`close`.

    Writers of several processes take turns; a crash leaves either the old or the new state (and at most a blob that
    nothing uses, which :meth:`verify` and :meth:`remove` clear away).
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder = folder
        self._engine = engine
        self._blobs = BlobStore(folder / "blobs")
        self._stacks = StackCache(folder / "stacks")

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
        return self.add_all([(record, encode_arrays(record))])[0]

    def add_all(self, entries: Iterable[tuple[Record, Mapping[str, bytes]]]) -> list[bool]:
        """Store records with their encoded arrays, all or none; for each, whether it is new.

        Entries are taken one at a time, so that they need not fit into memory together.
        """
        with self._engine.begin() as connection:
            # Inside the write lock, so that no other process clears the new blobs away as leftovers.
            return [self._add(connection, record, blobs) for record, blobs in entries]

    def _add(self, connection: Connection, record: Record, blobs: Mapping[str, bytes]) -> bool:
        digests = {kind: self._blobs.put(data) for kind, data in blobs.items()}
        if connection.execute(select(records.c.id).where(records.c.id == record.id)).first():
            return False
        connection.execute(insert(records).values(**row_of(record)))
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
            return self._load(connection, find_row(connection, key, str(self.folder)))

    def list(self, *, backbone_fingerprint: str | None = None) -> tuple[Record, ...]:
        """All records (of one backbone), by task name, then id. Scores are read when they are first looked at.

        Raises:
            BankDamagedError: a head is missing or changed; the message names the record. Looking at scores raises it
                too.
        """
        with self._engine.begin() as connection:
            rows = rows_of(connection, backbone_fingerprint=backbone_fingerprint)
            digests = digests_of(connection)
            return tuple(self._record(row, digests.get(row["id"], {})) for row in rows)

    def summaries(
        self, *, backbone_fingerprint: str | None = None, task: str | None = None
    ) -> tuple[RecordSummary, ...]:
        """All records (of one backbone, of one task) without their arrays, by task name, then id: quick."""
        with self._engine.begin() as connection:
            return tuple(map(summary_of, rows_of(connection, backbone_fingerprint=backbone_fingerprint, task=task)))

    def backbones(self) -> dict[str, int]:
        """How many records there are, by backbone fingerprint."""
        query = select(records.c.backbone_fingerprint, func.count()).group_by(records.c.backbone_fingerprint)
        with self._engine.begin() as connection:
            return {str(name): int(number) for name, number in connection.execute(query)}

    def set_policy(self, key: str, policy: Policy) -> str:
        """Change who may use a record. Returns its id.

        Raises:
            UnknownRecordError: no record, or several.
        """
        with self._engine.begin() as connection:
            record_id = str(find_row(connection, key, str(self.folder))["id"])
            connection.execute(update(records).where(records.c.id == record_id).values(policy=policy))
        return record_id

    def summary(self, key: str) -> RecordSummary:
        """The record that :meth:`get` would give, without its arrays.

        Raises:
            UnknownRecordError: none or several.
        """
        with self._engine.begin() as connection:
            return summary_of(find_row(connection, key, str(self.folder)))

    def digests_of(self, record_id: str) -> dict[str, str]:
        """SHA-256 of a record's stored arrays by kind; :meth:`blob` reads them."""
        with self._engine.begin() as connection:
            return digests_of(connection, record_id).get(record_id, {})

    def blob(self, sha256: str) -> bytes:
        """A stored array's bytes.

        Raises:
            BankDamagedError: it is missing or changed.
        """
        return self._blobs.get(sha256)

    def stack(self, backbone_fingerprint: str, layout_digest: str) -> ScoreStack | None:
        """Scores of all records of a backbone and layout as one matrix, kept in a file; None for a small bank.

        It is made anew when the set of records has changed, which takes as long as reading all their scores.

        Raises:
            BankDamagedError: an array is missing or changed.
            InputError: the records do not have the same groups.
        """
        with self._engine.begin() as connection:  # holds the lock: no record is forgotten while its scores are stacked
            votes = votes_of(connection, backbone_fingerprint, layout_digest)
            if len(votes) < STACK_FROM:
                return None
            found = self._stacks.find(votes, self._scores)
            if found is None:
                self._stacks.clear(all_votes(connection))  # of earlier sets of records
                found = self._stacks.make(votes, self._scores)
            return found

    def _scores(self, sha256: str) -> dict[str, ScoreArray]:
        try:
            return decode_scores(self._blobs.get(sha256))
        except (BankDamagedError, ValueError) as error:
            raise BankDamagedError(
                "a record's scores are damaged", why=str(error), next_step="kiridashi bank verify"
            ) from error

    def remove(self, key: str) -> str:
        """Forget a record: its row, every array that no other record uses, and stacks with its scores. Returns its id.

        Raises:
            UnknownRecordError: no record, or several.
        """
        with self._engine.begin() as connection:
            record_id = str(find_row(connection, key, str(self.folder))["id"])
            connection.execute(delete(record_blobs).where(record_blobs.c.record_id == record_id))
            connection.execute(delete(records).where(records.c.id == record_id))
        # Only after the row is gone for good: a crash in between leaves a leftover, never a record without arrays.
        self._clear_leftovers()
        self._clear_stacks()
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
        blobs = len({row["sha256"] for row in rows})
        return Inspection(count, blobs, tuple(faults), self._clear_leftovers(), self._clear_stacks(check=True))

    def _clear_leftovers(self) -> int:
        with self._engine.begin() as connection:
            used = set(connection.execute(select(record_blobs.c.sha256)).scalars())
            unused = [digest for digest in self._blobs.digests() if digest not in used]
            for digest in unused:
                self._blobs.delete(digest)
        return len(unused)

    def _clear_stacks(self, *, check: bool = False) -> int:
        """Remove stacks of sets of records that are no more, and with ``check`` damaged ones."""
        with self._engine.begin() as connection:
            return self._stacks.clear(all_votes(connection), check=check)

    def _load(self, connection: Connection, row: RowMapping) -> Record:
        digests = digests_of(connection, row["id"]).get(row["id"], {})
        record = self._record(row, digests)
        len(record.scores), len(record.taylor)  # a single record is read at once
        return record

    def _record(self, row: RowMapping, digests: Mapping[str, str]) -> Record:
        """The record; its head is read at once, its scores when they are looked at."""

        def read(kind: str) -> dict[str, ScoreArray]:
            try:
                return decode_scores(self._blobs.get(digests[kind]))
            except (BankDamagedError, KeyError, ValueError) as error:
                raise _damaged(row, error) from error

        try:
            data = self._blobs.get(digests["descriptor"]) if "descriptor" in digests else None
            descriptor = decode_descriptor(data)
            return record_of(
                row, StoredScores(partial(read, "scores")), StoredScores(partial(read, "taylor")), descriptor
            )
        except (BankDamagedError, InputError, ValueError) as error:
            raise _damaged(row, error) from error


def _damaged(row: RowMapping, error: Exception) -> BankDamagedError:
    return BankDamagedError(
        f"the record of '{row['task']}' ({row['id'][:12]}) is damaged",
        why=str(error),
        next_step=f"kiridashi bank forget {row['id'][:12]}, then learn the task again: kiridashi bank learn",
    )
