"""Errors of the exporters."""

from __future__ import annotations

from kiridashi.errors import ExitCode, KiridashiError


class ExportError(KiridashiError):
    """A model cannot be written in a format, or what was written does not compute the same."""

    exit_code = ExitCode.MODEL
