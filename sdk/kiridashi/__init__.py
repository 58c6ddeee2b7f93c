"""Kiridashi: what both sides share, and what a line application imports.

Importing this package loads neither numpy nor an inference runtime: :class:`LineModel`, :class:`LineInfo`
and :class:`Prediction` are looked up on first use, so the device agent's resident process stays small.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kiridashi.budget import Budget, Measurement, Verdict
from kiridashi.errors import KiridashiError
from kiridashi.manifest import Manifest

if TYPE_CHECKING:
    from kiridashi.line import LineInfo, LineModel, Prediction

__version__ = "0.1.0"
__all__ = ["Budget", "KiridashiError", "LineInfo", "LineModel", "Manifest", "Measurement", "Prediction", "Verdict"]

# onnxruntime 1.32 counts what it runs, in a database below the home folder, for its makers; it reads this when it is
# imported. A device beside a line keeps to itself; whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name in ("LineInfo", "LineModel", "Prediction"):
        from kiridashi import line

        return getattr(line, name)
    raise AttributeError(f"module 'kiridashi' has no attribute '{name}'")
