"""Errors of the exported program and of the passes over it."""

from __future__ import annotations

from kiridashi.errors import ExitCode, KiridashiError


class GraphError(KiridashiError):
    """A model cannot be captured, or a pass cannot be applied to its program."""

    exit_code = ExitCode.MODEL


class PlanError(GraphError):
    """A plan does not fit the layout it is to be applied to."""
