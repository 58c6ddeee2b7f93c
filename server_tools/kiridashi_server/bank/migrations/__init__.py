"""Alembic's script folder for the bank's database."""
