"""Tasks drawn from pools, with small made-up packages."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from kiridashi_server.tasks import TaskError
from kiridashi_server.tasks.drawings import RECIPE, Recipe, TaskRecipe
from kiridashi_server.tasks.packed import read_archive

Packages = Callable[..., list[dict[str, Any]]]

SPLITS = {"noto": ["train"], "fluent": ["val"], "twemoji": ["test"]}
AREAS = {"red": 12, "green": 12, "blue": 6}
"""Pictograms by sub-category; each is a pool, and an area, of its own."""

TABLE = [
    {"short_name": f"{area}_{n}", "image": f"{n:x}{area}.png", "subcategory": area, "sort_order": n}
    for area, count in AREAS.items()
    for n in range(count)
]
WORLD = {
    "seed": 0,
    "classes": 2,
    "least_difference": 2.0,
    "roles": {"bank": 4, "development": 2},
    "held_out_only": ["blue"],
    "leave_out": [],
    "pools": [{"name": area, "area": area, "subcategories": [area]} for area in AREAS],
}


def tasks_of(data: bytes) -> list[TaskRecipe]:
    return msgspec.json.decode(read_archive(data)[RECIPE], type=Recipe).tasks


def build(script: ModuleType, folder: Path, styles: list[dict[str, Any]], **change: object) -> bytes:
    whole = {"pack": "x.zip", "max_bytes": 100_000, "styles": styles, "world": WORLD | change}
    data: bytes = script.build(folder, msgspec.convert(whole, script.PackRecipe))
    return data


def test_the_draw_repeats_and_follows_its_seed(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    styles = packages(TABLE, {}, SPLITS)
    data = build(script, tmp_path, styles)
    assert data == build(script, tmp_path, styles)
    assert data != build(script, tmp_path, styles, seed=1)


def test_every_drawing_is_in_one_task_and_every_style_in_one_split(
    script: ModuleType, packages: Packages, tmp_path: Path
) -> None:
    tasks = tasks_of(build(script, tmp_path, packages(TABLE, {}, SPLITS)))
    assert len(tasks) == 15
    for style, splits in SPLITS.items():
        drawings = [drawing for task in tasks for drawing in task.styles[style]]
        assert max(Counter(drawing.name for drawing in drawings).values()) == 1
        assert [drawing.split for drawing in drawings] == splits * 30


def test_every_area_gets_its_share_of_each_role(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    tasks = tasks_of(build(script, tmp_path, packages(TABLE, {}, SPLITS)))
    roles = Counter((task.area, task.role) for task in tasks)
    for area in ("red", "green"):
        assert (roles[area, "bank"], roles[area, "development"], roles[area, "held-out"]) == (2, 1, 3)
    assert roles["blue", "held-out"] == 3
    assert {task.pool for task in tasks} == set(AREAS)


def test_what_looks_like_another_or_is_left_out_is_in_no_task(
    script: ModuleType, packages: Packages, tmp_path: Path
) -> None:
    styles = packages(TABLE, {"3red": "3blue"}, SPLITS)
    tasks = tasks_of(build(script, tmp_path, styles, leave_out=["green_5"]))
    used = {drawing.name for task in tasks for drawing in task.styles["noto"]}
    assert "5green" not in used
    assert len(used & {"3red", "3blue"}) <= 1
    assert Counter(task.area for task in tasks) == {"red": 6, "green": 5, "blue": 2}


def test_one_figure_is_one_pictogram(script: ModuleType) -> None:
    world = sys.modules[script.draw.__module__]
    cooks = {"1f9d1-200d-1f373", "1f468-200d-1f373", "1f469-200d-1f373"}
    runners = {"1f3c3", "1f3c3-200d-2642-fe0f", "1f3c3-200d-2640-fe0f", "1f3c3-200d-2640-fe0f-200d-27a1-fe0f"}
    assert len({world.figure(name) for name in cooks}) == 1
    assert len({world.figure(name) for name in runners}) == 1
    assert len({world.figure(name) for name in ("1f468", "1f469", "1f9d1")}) == 3


def test_too_few_tasks_for_the_roles_are_refused(script: ModuleType, packages: Packages, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="12 tasks are too few"):
        build(script, tmp_path, packages(TABLE, {}, SPLITS), roles={"bank": 13})
