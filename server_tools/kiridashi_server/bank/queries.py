"""What is asked of the bank's database, inside a transaction that the bank has begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, and_, or_, select

from kiridashi_server.bank.errors import UnknownRecordError
from kiridashi_server.bank.tables import record_blobs, records
from kiridashi_server.compose.stack import Vote

_AFTER_HEX = "g"
_LISTED = 10


def rows_of(
    connection: Connection, *, backbone_fingerprint: str | None = None, task: str | None = None
) -> Sequence[RowMapping]:
    """Rows of all records (of one backbone, of one task), by task name, then id."""
    wanted = {records.c.backbone_fingerprint: backbone_fingerprint, records.c.task: task}
    query = select(records).where(*(column == value for column, value in wanted.items() if value is not None))
    return connection.execute(query.order_by(records.c.task, records.c.id)).mappings().all()


def find_row(connection: Connection, key: str, where: str) -> RowMapping:
    """The row with this id, a unique beginning of it, or this task name.

    Args:
        connection: of the bank.
        key: what was asked for.
        where: the bank's folder, for the message.

    Raises:
        UnknownRecordError: none or several.
    """
    # A range of ids, not LIKE: only that uses the index.
    begins = and_(records.c.id >= key, records.c.id < key + _AFTER_HEX)
    query = select(records).where(or_(records.c.task == key, begins))
    found = connection.execute(query).mappings().all() if key else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise UnknownRecordError(
            f"the bank in {where} has no record '{key}'",
            why=f"it has {_listed(connection)}",
            next_step="kiridashi bank list",
        )
    raise UnknownRecordError(
        f"'{key}' means {len(found)} records",
        why=", ".join(row["id"][:12] for row in found[:_LISTED]),
        next_step="give the beginning of one of these ids",
    )


def digests_of(connection: Connection, record_id: str | None = None) -> dict[str, dict[str, str]]:
    """SHA-256 of stored arrays by record id and kind, of one record or of all."""
    query: Any = select(record_blobs.c.record_id, record_blobs.c.kind, record_blobs.c.sha256)
    if record_id is not None:
        query = query.where(record_blobs.c.record_id == record_id)
    found: dict[str, dict[str, str]] = {}
    for owner, kind, sha256 in connection.execute(query):
        found.setdefault(str(owner), {})[str(kind)] = str(sha256)
    return found


def votes_of(connection: Connection, backbone_fingerprint: str, layout_digest: str) -> list[Vote]:
    """What goes into the stack of a backbone and layout, by record id."""
    query = (
        select(records.c.id, record_blobs.c.sha256, records.c.kind)
        .join(record_blobs, records.c.id == record_blobs.c.record_id)
        .where(records.c.backbone_fingerprint == backbone_fingerprint, records.c.layout_digest == layout_digest)
        .where(record_blobs.c.kind == "scores")
        .order_by(records.c.id)
    )
    return [Vote(str(name), str(sha256), kind == "learnt") for name, sha256, kind in connection.execute(query)]


def all_votes(connection: Connection) -> list[list[Vote]]:
    """:func:`votes_of` every backbone and layout that the bank has."""
    query = select(records.c.backbone_fingerprint, records.c.layout_digest).distinct()
    return [votes_of(connection, fingerprint, layout) for fingerprint, layout in connection.execute(query).all()]


def _listed(connection: Connection) -> str:
    tasks = connection.execute(select(records.c.task).order_by(records.c.task)).scalars().all()
    more = f" and {len(tasks) - _LISTED} more" if len(tasks) > _LISTED else ""
    return (", ".join(tasks[:_LISTED]) + more) if tasks else "no record at all"
