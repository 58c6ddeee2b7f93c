"""Records and the blobs they use."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create both tables and their indexes."""
    op.create_table(
        "records",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("task", sa.String, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("backbone_fingerprint", sa.String, nullable=False),
        sa.Column("layout_digest", sa.String, nullable=False),
        sa.Column("samples", sa.Integer, nullable=False),
        sa.Column("outcomes", sa.JSON, nullable=False),
        sa.Column("provenance", sa.JSON, nullable=False),
        sa.Column("policy", sa.String, nullable=False),
        sa.Column("created", sa.String, nullable=False),
    )
    op.create_index("ix_records_task", "records", ["task"])
    op.create_index("ix_records_backbone_fingerprint", "records", ["backbone_fingerprint"])
    op.create_table(
        "record_blobs",
        sa.Column("record_id", sa.String(64), sa.ForeignKey("records.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    op.create_index("ix_record_blobs_sha256", "record_blobs", ["sha256"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("record_blobs")
    op.drop_table("records")
