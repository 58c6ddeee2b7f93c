"""Errors of the bank."""

from __future__ import annotations

from kiridashi.errors import InputError, StateError


class UnknownRecordError(InputError):
    """The bank has no such record, or the name means more than one."""


class BankDamagedError(StateError):
    """The bank's folder, database or a stored array is missing or changed."""
