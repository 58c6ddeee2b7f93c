"""The build script, and small made-up packages for it."""

import base64
import hashlib
import importlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[3] / "scripts"
STYLES = {
    "noto": ("emoji-datasource-google", "package/img/{}.png", ["train", "val"]),
    "fluent": ("@lobehub/fluent-emoji-3d", "package/assets/{}.webp", ["train", "val"]),
    "twemoji": ("emoji-datasource-twitter", "package/img/{}.png", ["test", "tune", "holdout"]),
}
TABLE = "package/emoji.json"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("build_tasks")


@pytest.fixture
def packages(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Write packages with these pictograms to ``tmp_path``; gives the styles of a recipe that pins them.

    ``looks_like`` makes one drawing look like another; ``splits`` replaces what the styles are used for.
    """

    def write(
        table: Sequence[Mapping[str, Any]], looks_like: Mapping[str, str], splits: Mapping[str, list[str]] | None = None
    ) -> list[dict[str, Any]]:
        styles = []
        names = [Path(entry["image"]).stem for entry in table]
        for style, (package, member, usual) in STYLES.items():
            kind = "WEBP" if member.endswith("webp") else "PNG"
            contents = {member.format(name): drawing(style, looks_like.get(name, name), kind) for name in names}
            if style == "noto":
                contents[TABLE] = json.dumps(table).encode()
            file = tmp_path / f"{package.lstrip('@').replace('/', '-')}-1.0.tgz"
            write_package(file, contents)
            digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
            pinned = {"package": package, "version": "1.0", "integrity": f"sha512-{digest}", "licence": "MIT"}
            used = {"splits": (splits or {}).get(style, usual), "table": TABLE if style == "noto" else ""}
            styles.append({"style": style, "member": member, **pinned, **used})
        return styles

    return write


def write_package(file: Path, contents: Mapping[str, bytes]) -> None:
    with tarfile.open(file, "w:gz") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def drawing(style: str, name: str, kind: str) -> bytes:
    """A disc in a colour of its own on transparent ground."""
    values = np.random.default_rng(list(f"{style}{name}".encode())).integers(0, 256, 3)
    y, x = np.mgrid[:64, :64]
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[(x - 32) ** 2 + (y - 32) ** 2 < 800] = [*values, 255]
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, kind)
    return buffer.getvalue()
