"""The build script on listed tasks, with three small made-up packages."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from kiridashi_server.tasks import TaskError
from kiridashi_server.tasks.drawings import RECIPE, Recipe
from kiridashi_server.tasks.packed import read_archive

Packages = Callable[..., list[dict[str, Any]]]

COUNTS = {"train": 2, "val": 1, "tune": 1, "holdout": 1, "test": 1}
CLASSES = {"b": ["b0", "b1", "b2"], "a": ["a0", "a1", "a2", "a3"]}
TABLE = [{"short_name": name, "image": f"{name}.png"} for name in ("a0", "a1", "a2", "a3", "b0", "b1", "b2")]


def build(script: ModuleType, folder: Path, styles: list[dict[str, Any]], **change: object) -> bytes:
    whole = {"pack": "x.zip", "max_bytes": 100_000, "styles": styles}
    whole |= {"tasks": {"shapes": {"counts": COUNTS, "classes": CLASSES}}, **change}
    data: bytes = script.build(folder, msgspec.convert(whole, script.PackRecipe))
    return data


def test_same_packages_same_bytes(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    styles = packages(TABLE, {})
    data = build(script, tmp_path, styles)
    assert data == build(script, tmp_path, styles)
    recipe = msgspec.json.decode(read_archive(data)[RECIPE], type=Recipe)
    assert recipe.tasks[0].labels == ["a", "b"]
    splits = {style: [d.split for d in drawings] for style, drawings in recipe.tasks[0].styles.items()}
    assert splits["noto"] == ["train", "train", "val"] * 2
    assert splits["twemoji"] == ["test", "tune", "holdout"] * 2


def test_a_package_that_is_not_the_pinned_one_is_refused(
    script: ModuleType, packages: Packages, tmp_path: Path
) -> None:
    styles = packages(TABLE, {})
    file = next(tmp_path.glob("emoji-datasource-twitter*"))
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(TaskError, match="not the pinned package"):
        build(script, tmp_path, styles)


def test_a_drawing_that_looks_like_another_is_not_used(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    data = build(script, tmp_path, packages(TABLE, {"a3": "a1"}))
    recipe = msgspec.json.decode(read_archive(data)[RECIPE], type=Recipe)
    used = {drawing.name for drawing in recipe.tasks[0].styles["noto"]}
    assert len(used & {"a1", "a3"}) == 1


def test_too_few_different_drawings_are_named(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="class 'b' of 'shapes' has 2 different drawings; 3 are needed"):
        build(script, tmp_path, packages(TABLE, {"b2": "b0"}))


def test_a_drawing_in_two_classes_is_refused(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    shared = {"counts": COUNTS, "classes": {"a": ["a0", "a1", "a2"], "b": ["b0", "b1", "a2"]}}
    with pytest.raises(TaskError, match="stands in"):
        build(script, tmp_path, packages(TABLE, {}), tasks={"shapes": shared})


def test_a_pack_over_its_limit_is_refused(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="1000 are allowed"):
        build(script, tmp_path, packages(TABLE, {}), max_bytes=1_000)


def test_a_recipe_with_a_word_that_nothing_reads_is_refused(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('pack = "x.zip"\nmax_bytes = 1\nstyles = []\nmax_byte = 2\n')
    with pytest.raises(TaskError, match="max_byte"):
        script.read_recipe(file)
