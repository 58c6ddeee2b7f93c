"""The bank's tables as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import JSON, Column, ForeignKey, Integer, MetaData, String, Table

metadata = MetaData()

records = Table(
    "records",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("task", String, nullable=False, index=True),
    Column("labels", JSON, nullable=False),
    Column("backbone_fingerprint", String, nullable=False, index=True),
    Column("layout_digest", String, nullable=False),
    Column("samples", Integer, nullable=False),
    Column("outcomes", JSON, nullable=False),
    Column("provenance", JSON, nullable=False),
    Column("policy", String, nullable=False),
    Column("created", String, nullable=False),
    Column("kind", String, nullable=False, server_default="learnt"),
)

record_blobs = Table(
    "record_blobs",
    metadata,
    Column("record_id", String(64), ForeignKey("records.id", ondelete="CASCADE"), primary_key=True),
    Column("kind", String, primary_key=True),
    Column("sha256", String(64), nullable=False, index=True),
)
