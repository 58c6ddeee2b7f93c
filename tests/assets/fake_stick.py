"""A memory stick of a fake fleet's, in the layout of ``kiridashi.stick``."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from fake_fleet import FakeFleet
from kiridashi.stick import INDEX_NAME, StickIndex


def contents(fleet: FakeFleet, target: str, line: str = "press-3") -> dict[str, bytes]:
    index = StickIndex(line=line, target=target, written="2026-11-24T08:00:00", valid_until="2026-12-24T08:00:00")
    files = {f"metadata/{name}": data for name, data in fleet.metadata.items()}
    files |= {f"targets/{name}": data for name, data in fleet.targets.items()}
    files |= {f"blobs/{sha256}": b"".join(chunks) for sha256, chunks in fleet.blobs.items()}
    return files | {INDEX_NAME: index.encode()}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_file(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
