"""What every part of the registry does with its database: transactions, generations, and a device's history."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from kiridashi.errors import StateError
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from kiridashi_server.fleet.tables import DEVICE, EVENT

EVENTS_KEPT = 1000


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction.

    Raises:
        StateError: the database failed; nothing of it was done.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise StateError(
            f"the registry at {engine.url} failed",
            why=str(error).splitlines()[0],
            next_step="kiridashi doctor",
        ) from error


def next_generation(db: Connection, device: str) -> None:
    """Something else is wanted of a device."""
    db.execute(update(DEVICE).where(DEVICE.c.name == device).values(generation=DEVICE.c.generation + 1))


def note_event(db: Connection, device: str, kind: str, payload: str, now: datetime) -> None:
    """Add to a device's history, of which the newest 1000 entries are kept."""
    db.execute(insert(EVENT).values(device=device, kind=kind, at=stamp(now), payload=payload))
    ids = select(EVENT.c.id).where(EVENT.c.device == device).order_by(EVENT.c.id.desc())
    oldest = db.execute(ids.offset(EVENTS_KEPT).limit(1)).scalar()
    if oldest is not None:
        db.execute(delete(EVENT).where((EVENT.c.device == device) & (EVENT.c.id <= oldest)))


def stamp(now: datetime) -> str:
    """A time as the registry keeps it: ISO 8601 UTC, seconds."""
    return now.astimezone(UTC).isoformat(timespec="seconds")
