"""The registry's tables, and how its database is opened."""

from __future__ import annotations

import sqlite3
from typing import Any

from kiridashi.errors import InputError, StateError
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

BUSY_TIMEOUT_S = 15
METADATA = MetaData()
LINE = Table(
    "line",
    METADATA,
    Column("name", String(63), primary_key=True),
    Column("created", String(32), nullable=False),
    Column("offered", Integer),
)
RELEASE = Table(
    "release",
    METADATA,
    Column("line", ForeignKey("line.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("target", String(160), nullable=False, unique=True),
    Column("manifest_digest", String(71), nullable=False),
    Column("published", String(32), nullable=False),
)
RELEASE_BLOB = Table(
    "release_blob",
    METADATA,
    Column("sha256", String(64), primary_key=True),
    Column("line", ForeignKey("line.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
)
DEVICE = Table(
    "device",
    METADATA,
    Column("name", String(63), primary_key=True),
    Column("certificate_serial", String(64), nullable=False),
    Column("certificate_key_sha256", String(64), nullable=False),
    Column("seal_public_key_pem", Text, nullable=False),
    Column("enrolled", String(32), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("sent_generation", BigInteger, nullable=False),
    Column("online", Boolean),
    Column("reported", Text),
    Column("reported_at", String(32)),
)
ASSIGNMENT = Table(
    "assignment",
    METADATA,
    Column("device", ForeignKey("device.name"), primary_key=True),
    Column("line", ForeignKey("line.name"), primary_key=True),
    Column("wanted", Integer),
)
EVENT = Table(
    "event",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("device", ForeignKey("device.name"), nullable=False),
    Column("kind", String(63), nullable=False),
    Column("at", String(32), nullable=False),
    Column("payload", Text, nullable=False),
    Index("event_by_device", "device", "id"),
)
PROBE_SET = Table(
    "probe_set",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("name", String(160), nullable=False),
    Column("backbone_fingerprint", String(160), nullable=False),
    Column("runtime", String(32), nullable=False),
    Column("graphs", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("published", String(32), nullable=False),
)
PROBE_BLOB = Table(
    "probe_blob",
    METADATA,
    Column("sha256", String(64), primary_key=True),
    Column("probes", ForeignKey("probe_set.digest"), primary_key=True),
)
CANDIDATE = Table(
    "candidate",
    METADATA,
    Column("probes", ForeignKey("probe_set.digest"), primary_key=True),
)
PROFILE_REQUEST = Table(
    "profile_request",
    METADATA,
    Column("device", ForeignKey("device.name"), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("probes", ForeignKey("probe_set.digest"), nullable=False),
    Column("seconds", Float, nullable=False),
    Column("threads", Integer, nullable=False),
    Column("asked", String(32), nullable=False),
    Column("answered", String(32)),
)
PROFILE = Table(
    "profile",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("device", ForeignKey("device.name"), nullable=False),
    Column("request", BigInteger, nullable=False),
    Column("device_class", String(200), nullable=False),
    Column("probes", ForeignKey("probe_set.digest"), nullable=False),
    Column("backbone_fingerprint", String(160), nullable=False),
    Column("runtime", String(32), nullable=False),
    Column("threads", Integer, nullable=False),
    Column("complete", Boolean, nullable=False),
    Column("measured", String(32), nullable=False),
    Column("report", Text, nullable=False),
    Index("profile_by_class", "device_class", "id"),
)


def open_engine(url: str) -> Engine:
    """Open a database and create the tables that are missing.

    SQLite runs in write-ahead mode with full synchronisation: a generation number that a device has seen is
    never lost to a power cut. Writers take the lock at once and wait up to 15 s for each other.

    Raises:
        InputError: the URL is malformed or names a driver that is not installed.
        StateError: the database cannot be opened.
    """
    try:
        engine = create_engine(url)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise InputError(
            f"the database URL '{url}' cannot be used",
            why=str(error),
            next_step="give a URL such as sqlite:////var/lib/kiridashi/registry.sqlite",
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        METADATA.create_all(engine.execution_options(writes=True))
    except SQLAlchemyError as error:
        raise StateError(f"the registry at {engine.url} cannot be opened", why=str(error)) from error
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by the listener below, not by the driver
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_S * 1000}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
