"""Finished cells of long benchmarks, kept until code or machine change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kiridashi.artifacts import write_atomic

from benchmarks.report import machine

VARIABLE = "KIRIDASHI_BENCH_CELLS"
"""Environment variable that names the folder; without it nothing is kept."""

_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Cells:
    """Results by name in a folder, for one digest of code, machine and settings."""

    folder: Path | None
    digest: str

    @classmethod
    def of_environment(cls, code: Iterable[str], **settings: object) -> Cells:
        """The cells in the folder that the environment names, for the Python files under ``code`` as they are now.

        Args:
            code: folders, relative to the repository.
            settings: all else that the results depend on, as JSON values.
        """
        folder = os.environ.get(VARIABLE)
        return cls.of(Path(folder) if folder else None, code, **settings)

    @classmethod
    def of(cls, folder: Path | None, code: Iterable[str], **settings: object) -> Cells:
        """The cells in ``folder``; ``code`` may name Python files as well."""
        digest = hashlib.sha256(json.dumps([machine(), settings], sort_keys=True).encode())
        places = [_ROOT / place for place in code]
        for path in sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py"))):
            digest.update(f"\0{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
        return cls(folder, digest.hexdigest())

    def has(self, name: str) -> bool:
        """Whether a result of that name is in the folder."""
        return self.folder is not None and self._path(self.folder, name).exists()

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The result called ``name``, from the folder or from ``make``, and whether it was in the folder."""
        if self.folder is None:
            return make(), False
        path = self._path(self.folder, name)
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept, True
        result = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result).encode())
        return result, False

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}-{self.digest[:16]}.json"
