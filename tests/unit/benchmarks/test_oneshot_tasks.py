"""The partition of the benchmark of reuse, as the pack states it."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from kiridashi_server.tasks import TaskError
from kiridashi_server.tasks.drawings import Drawing, Pack

from benchmarks.oneshot_tasks import DATA, PACK, kinship, read_pack, task_names


@pytest.fixture(scope="module")
def pack() -> Pack:
    return read_pack()


def test_every_task_has_one_role_and_there_are_enough_of_each(pack: Pack) -> None:
    bank, held_out, development = task_names("bank"), task_names("held-out"), task_names("development")
    assert len(bank) >= 20
    assert len(held_out) >= 30
    assert len(development) >= 4
    assert sorted(bank + held_out + development) == sorted(pack.names)
    assert len(set(pack.names)) == len(pack.names)


def test_classes_and_drawings_are_in_one_task_only(pack: Pack) -> None:
    labels = Counter(label for task in pack.recipe.tasks for label in task.labels)
    drawings = Counter(
        name
        for task in pack.recipe.tasks
        for name in {drawing.name for drawings in task.styles.values() for drawing in drawings}
    )
    assert max(labels.values()) == 1
    assert max(drawings.values()) == 1
    assert all(len(task.labels) == 12 for task in pack.recipe.tasks)
    assert len(labels) == len(drawings)


def test_every_class_is_in_every_style_and_a_style_is_in_one_split(pack: Pack) -> None:
    splits: dict[str, set[str]] = {}
    for task in pack.recipe.tasks:
        for style, drawings in task.styles.items():
            assert [drawing.label for drawing in drawings] == list(range(12))
            splits.setdefault(style, set()).update(drawing.split for drawing in drawings)
    assert Counter(min(of_style) for of_style in splits.values()) == {"train": 4, "val": 2, "test": 2}
    assert all(len(of_style) == 1 for of_style in splits.values())


def test_one_figure_is_in_one_class(pack: Pack) -> None:
    """A man and a woman who do the same would be the same class twice."""
    names = [drawing.name for drawing in _drawings(pack)]
    genders = re.compile("-(2640|2642)(-fe0f)?")
    figures = [re.sub("^1f46[89]-", "1f9d1-", genders.sub("", name).replace("-200d", "")) for name in names]
    assert len(set(figures)) == len(set(names))


def test_the_bank_has_no_kin_of_some_held_out_tasks() -> None:
    kin = Counter(map(kinship, task_names("held-out")))
    assert kin["none"] >= 10
    assert kin["pool"] >= 10
    assert kin["area"] >= 5
    assert kinship("greek-1") == "none"
    assert set(map(kinship, task_names("bank"))) == {"pool"}


def test_every_area_of_the_bank_is_held_out_and_developed_on_too(pack: Pack) -> None:
    areas = {role: {pack.task(name).area for name in task_names(role)} for role in ("bank", "held-out")}
    assert len(areas["bank"]) == 7
    assert areas["held-out"] - areas["bank"] == {"flags", "food", "type"}
    assert areas["bank"] <= areas["held-out"]


def test_every_package_is_attributed(pack: Pack) -> None:
    notice = (DATA / "NOTICE.md").read_text(encoding="utf-8")
    assert {package.licence for package in pack.recipe.packages} == {"Apache-2.0", "MIT", "CC-BY-4.0", "OFL-1.1"}
    for package in pack.recipe.packages:
        assert f"`{package.package}` {package.version}" in notice


def test_a_changed_pack_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA, tmp_path / "data"))
    assert read_pack(folder).names == read_pack().names
    data = bytearray((folder / PACK).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / PACK).write_bytes(data)
    with pytest.raises(TaskError, match="SHA-256") as caught:
        read_pack(folder)
    assert "oneshot_tasks.toml" in caught.value.next_step


def _drawings(pack: Pack) -> list[Drawing]:
    return [drawing for task in pack.recipe.tasks for drawings in task.styles.values() for drawing in drawings]
