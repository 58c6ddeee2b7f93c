"""What a run found, as ``report.json`` for programs and ``report.html`` for people."""

from __future__ import annotations

from kiridashi_server.report.page import write_page
from kiridashi_server.report.schema import Report

__all__ = ["Report", "write_page"]
