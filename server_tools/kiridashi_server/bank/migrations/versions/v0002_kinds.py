"""Where a record's scores come from; all records so far were learnt."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("records", sa.Column("kind", sa.String, nullable=False, server_default="learnt"))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("records", "kind")
