"""The build script, on three small made-up packages."""

import base64
import hashlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from kiridashi_server.tasks import TaskError
from kiridashi_server.tasks.packed import read_archive
from kiridashi_server.tasks.shipped import RECIPE, Recipe
from PIL import Image

SCRIPT = Path(__file__).parents[3] / "scripts" / "build_tasks.py"
COUNTS = {"train": 2, "val": 1, "tune": 1, "holdout": 1, "test": 1}
SPECS = {"shapes": {"counts": COUNTS, "classes": {"b": ["b0", "b1", "b2"], "a": ["a0", "a1", "a2", "a3"]}}}
NAMES = ["a0", "a1", "a2", "a3", "b0", "b1", "b2"]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tasks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawing(style: str, name: str, kind: str) -> bytes:
    """A disc in a colour of its own on transparent ground."""
    values = np.random.default_rng(list(f"{style}{name}".encode())).integers(0, 256, 3)
    y, x = np.mgrid[:64, :64]
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[(x - 32) ** 2 + (y - 32) ** 2 < 800] = [*values, 255]
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def packages(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Write the packages, pin them in the script; a mapping makes one drawing look like another."""

    def write(looks_like: dict[str, str]) -> Path:
        pinned = []
        for package in script.PACKAGES:
            member = script.MEMBERS[package.style]
            kind = "WEBP" if member.endswith("webp") else "PNG"
            contents = {member.format(n): drawing(package.style, looks_like.get(n, n), kind) for n in NAMES}
            if package.style == "noto":
                table = [{"short_name": name, "image": f"{name}.png"} for name in NAMES]
                contents[script.NAMES] = json.dumps(table).encode()
            file = tmp_path / f"{package.package.lstrip('@').replace('/', '-')}-{package.version}.tgz"
            with tarfile.open(file, "w:gz") as archive:
                for name, data in contents.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
            pinned.append(msgspec.structs.replace(package, integrity=f"sha512-{digest}"))
        monkeypatch.setattr(script, "PACKAGES", tuple(pinned))
        return tmp_path

    return write


def test_same_packages_same_bytes(script: ModuleType, packages: Callable[[dict[str, str]], Path]) -> None:
    folder = packages({})
    data = script.build(folder, SPECS)
    assert data == script.build(folder, SPECS)
    recipe = msgspec.json.decode(read_archive(data)[RECIPE], type=Recipe)
    assert recipe.tasks[0].labels == ["a", "b"]
    splits = {style: [d.split for d in drawings] for style, drawings in recipe.tasks[0].styles.items()}
    assert splits["noto"] == ["train", "train", "val"] * 2
    assert splits["twemoji"] == ["test", "tune", "holdout"] * 2


def test_a_package_that_is_not_the_pinned_one_is_refused(
    script: ModuleType, packages: Callable[[dict[str, str]], Path]
) -> None:
    folder = packages({})
    file = next(folder.glob("emoji-datasource-twitter*"))
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(TaskError, match="not the pinned package"):
        script.build(folder, SPECS)


def test_a_drawing_that_looks_like_another_is_not_used(
    script: ModuleType, packages: Callable[[dict[str, str]], Path]
) -> None:
    recipe = msgspec.json.decode(read_archive(script.build(packages({"a3": "a1"}), SPECS))[RECIPE], type=Recipe)
    used = {drawing.name for drawing in recipe.tasks[0].styles["noto"]}
    assert len(used & {"a1", "a3"}) == 1


def test_too_few_different_drawings_are_named(script: ModuleType, packages: Callable[[dict[str, str]], Path]) -> None:
    with pytest.raises(TaskError, match="class 'b' of 'shapes' has 2 different drawings; 3 are needed"):
        script.build(packages({"b2": "b0"}), SPECS)


def test_a_drawing_in_two_classes_is_refused(script: ModuleType, packages: Callable[[dict[str, str]], Path]) -> None:
    shared = {"shapes": {"counts": COUNTS, "classes": {"a": ["a0", "a1", "a2"], "b": ["b0", "b1", "a2"]}}}
    with pytest.raises(TaskError, match="stands in"):
        script.build(packages({}), shared)
