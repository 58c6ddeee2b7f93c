"""The tasks in the package: what they promise, from the installed data."""

import shutil
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from kiridashi_server.tasks import (
    Task,
    TaskError,
    Views,
    contact_sheet,
    load_packed,
    load_shipped,
    load_task,
    pack,
    save_task_folder,
    shipped,
    shipped_names,
)
from PIL import Image

DATA = Path(str(files("kiridashi_server.tasks") / "data"))


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_shipped(name) for name in shipped_names()}


def styles(task: Task, split: str) -> set[str]:
    return {source.split("/")[0] for source in task.split(split).sources}


def test_eight_tasks_of_twelve_classes_within_two_megabytes(tasks: dict[str, Task]) -> None:
    assert len(tasks) == 8
    assert all(len(task.labels) == 12 for task in tasks.values())
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 2_000_000


def test_every_package_is_attributed() -> None:
    notice = (DATA / "NOTICE.md").read_text(encoding="utf-8")
    recipe = shipped.shipped_pack().recipe
    assert {package.licence for package in recipe.packages} == {"Apache-2.0", "MIT", "CC-BY-4.0"}
    for package in recipe.packages:
        assert f"`{package.package}` {package.version}" in notice


def test_no_drawing_in_one_style_stands_in_two_splits(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        owners = Counter(source for samples in task.splits.values() for source in set(samples.sources))
        assert set(owners.values()) == {1}


def test_the_device_sees_a_style_that_the_server_does_not(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        server = styles(task, "train") | styles(task, "val")
        device = styles(task, "tune") | styles(task, "holdout") | styles(task, "test")
        assert server == {"noto", "fluent"}
        assert device == {"twemoji"}


def test_each_class_has_enough_drawings_and_views(tasks: dict[str, Task]) -> None:
    least = {"train": (8, 16), "val": (4, 8), "tune": (2, 6), "holdout": (1, 4), "test": (3, 20)}
    for task in tasks.values():
        for split, (drawings, views) in least.items():
            samples = task.split(split)
            for label in range(12):
                mine = samples.labels == label
                assert mine.sum() >= views
                assert len({samples.sources[i] for i in np.flatnonzero(mine)}) >= drawings


def test_drawings_and_classes_are_not_shared_between_tasks(tasks: dict[str, Task]) -> None:
    labels = Counter(label for task in tasks.values() for label in task.labels)
    drawings = Counter(
        name
        for task in tasks.values()
        for name in {source for samples in task.splits.values() for source in samples.sources}
    )
    assert max(labels.values()) == 1
    assert max(drawings.values()) == 1


def test_loading_is_quick() -> None:
    def seconds() -> float:
        started = time.process_time()
        load_shipped("roles-a")
        return time.process_time() - started

    assert min(seconds() for _ in range(2)) < 1


def test_loading_is_deterministic_and_seeded(tasks: dict[str, Task]) -> None:
    assert load_shipped("hands-b").digest == tasks["hands-b"].digest
    other = load_shipped("hands-b", seed=1)
    assert other.digest != tasks["hands-b"].digest
    assert other.split("test").sources == tasks["hands-b"].split("test").sources


def test_more_views_keep_the_first_ones(tasks: dict[str, Task]) -> None:
    more = load_shipped("goods", views=Views(train=3)).split("train")
    few = tasks["goods"].split("train")
    assert len(more) == len(few) * 3 // 2
    third = np.arange(len(more)) % 3 == 2
    assert np.array_equal(more.images[~third], few.images)


def test_image_size_and_views_are_arguments() -> None:
    task = load_shipped("animals", image_size=32, views=Views(train=1, val=1, tune=1, holdout=1, test_per_class=4))
    assert task.split("train").images.shape == (96, 32, 32, 3)
    assert len(task.split("test")) == 12 * 6
    with pytest.raises(TaskError, match="at least one view"):
        Views(tune=0)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TaskError, match="roles-a"):
        load_shipped("roles-z")


def test_a_changed_pack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    assert len(shipped_names()) == 8
    file = tmp_path / "data" / shipped.PACK
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(TaskError, match="SHA-256") as caught:
        load_shipped("roles-a")
    assert "install" in caught.value.next_step
    file.unlink()
    with pytest.raises(TaskError, match="cannot be read"):
        shipped_names()


def test_a_shipped_task_survives_both_forms(tmp_path: Path) -> None:
    task = load_shipped("sports", views=Views(train=1, val=1, tune=1, holdout=1, test_per_class=6))
    pack(task, tmp_path / "sports.kiri")
    assert load_packed(tmp_path / "sports.kiri").digest == task.digest
    save_task_folder(task, tmp_path / "sports")
    assert load_task(tmp_path / "sports").digest == task.digest


def test_contact_sheet_shows_every_class_and_split(tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks["hands-a"]
    file = tmp_path / "sheet.png"
    contact_sheet(task, file, per_split=2)
    with Image.open(file) as image:
        page = np.asarray(image.convert("RGB"))
    ground = (page == page[0, 0]).all(axis=2)
    tops, lefts = _starts(ground.mean(axis=1) > 0.97), _starts(ground.mean(axis=0) > 0.95)
    shown = {page[y : y + 64, x : x + 64].tobytes() for y in tops for x in lefts}
    for samples in task.splits.values():
        for label in range(12):
            mine = samples.images[samples.labels == label]
            assert sum(image.tobytes() in shown for image in mine) == 2


def _starts(empty: np.ndarray) -> list[int]:
    """Positions at which something begins after an empty row or column."""
    return [i for i in range(1, len(empty) - 63) if empty[i - 1] and not empty[i]]
