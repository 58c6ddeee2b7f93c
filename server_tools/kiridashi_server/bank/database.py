"""The bank's SQLite database: opened, brought to the newest version, and written by one process at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.script
import alembic.util
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DatabaseError

from kiridashi_server.bank.errors import BankDamagedError

_WAIT_S = 60


def open_database(path: Path) -> Engine:
    """The database in ``path``, created when missing and migrated to the newest version.

    Every transaction takes SQLite's write lock when it begins and waits for it up to a minute, so two processes
    never interleave, not even while migrating.

    Raises:
        BankDamagedError: the file is no database, or a newer version of this package wrote it.
    """
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _WAIT_S})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    config = alembic.config.Config()
    config.set_main_option("script_location", "kiridashi_server.bank:migrations")
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")
    except DatabaseError as error:
        engine.dispose()
        raise BankDamagedError(
            f"{path} cannot be opened as a bank",
            why=str(error.orig),
            next_step="name another folder with --bank, or restore this one from a copy",
        ) from error
    except alembic.util.CommandError as error:
        engine.dispose()
        raise BankDamagedError(
            f"{path} has a version that is not known here",
            why=str(error),
            next_step="use the version of kiridashi that wrote it, or a newer one",
        ) from error
    return engine


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver would begin transactions by itself, late and without the lock; SQLAlchemy's event begins them.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")


def _on_begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
