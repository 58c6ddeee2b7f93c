"""Alembic's entry: migrate on the connection that the bank has opened, inside its transaction."""

from __future__ import annotations

from alembic import context

from kiridashi_server.bank.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
