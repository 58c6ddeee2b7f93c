"""Assessments beside the bank's records: one small JSON file a task and settings, rewritten whole after every cell."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from kiridashi.artifacts import write_atomic

from kiridashi_server.bank.errors import BankDamagedError
from kiridashi_server.similarity.assessment import Assessment


class AssessmentStore:
    """Assessments in ``bank/assessments``.

    Args:
        bank: the bank's folder.
    """

    def __init__(self, bank: Path) -> None:
        self._folder = bank / "assessments"

    def put(self, assessment: Assessment) -> None:
        """Store it durably in place of an earlier one of the same task, backbone, layout and settings."""
        path = self._path(assessment)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.format(msgspec.json.encode(assessment), indent=1))

    def like(self, assessment: Assessment) -> Assessment | None:
        """The stored one of the same task, backbone, layout and settings, if there is one.

        Raises:
            BankDamagedError: its file cannot be read.
        """
        path = self._path(assessment)
        return _read(path) if path.is_file() else None

    def list(self) -> tuple[Assessment, ...]:
        """All that are stored.

        Raises:
            BankDamagedError: a file cannot be read.
        """
        return tuple(_read(path) for path in sorted(self._folder.glob("*.json")))

    def forget(self, record_id: str) -> None:
        """Delete assessments of the record's own task, and from the others what was measured with the record."""
        for assessment in self.list():
            left = assessment.without(record_id)
            if left is None:
                self._path(assessment).unlink()
            elif left != assessment:
                self.put(left)

    def _path(self, assessment: Assessment) -> Path:
        key = [assessment.task_digest, assessment.backbone_fingerprint, assessment.layout_digest, assessment.settings]
        return self._folder / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:32]}.json"


def _read(path: Path) -> Assessment:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Assessment)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BankDamagedError(
            f"{path} is no assessment",
            why=str(error),
            next_step="delete the file, and measure it again: kiridashi bank assess",
        ) from error
