"""Rendered tasks of the benchmark of reuse."""

import time
from collections import Counter

import numpy as np
import pytest
from kiridashi_server.tasks import Task, TaskError, Views

from benchmarks.oneshot_tasks import DATA, load_task, read_pack, task_names

ONE = Views(train=1, val=1, test_per_class=1)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """Every task at the smallest size that still shows something, one view of each drawing."""
    return {name: load_task(name, image_size=32, views=ONE) for name in read_pack().names}


def styles(task: Task, split: str) -> set[str]:
    return {source.partition("/")[0] for source in task.split(split).sources}


def test_no_drawing_is_in_two_splits_or_tasks(tasks: dict[str, Task]) -> None:
    owners = Counter(
        source for task in tasks.values() for samples in task.splits.values() for source in set(samples.sources)
    )
    assert len(owners) == len(tasks) * 12 * 4
    assert max(owners.values()) == 1


def test_no_two_images_are_the_same(tasks: dict[str, Task]) -> None:
    images = Counter(
        image.tobytes() for task in tasks.values() for samples in task.splits.values() for image in samples.images
    )
    assert max(images.values()) == 1


def test_nobody_but_the_test_sees_the_style_of_the_test(tasks: dict[str, Task]) -> None:
    seen = {style for task in tasks.values() for split in ("train", "val") for style in styles(task, split)}
    tested = {style for task in tasks.values() for style in styles(task, "test")}
    assert tested == {"twemoji", "comfortaa"}
    assert not tested & seen


def test_a_class_has_few_samples_to_learn_from_and_enough_to_be_judged_on() -> None:
    task = load_task(task_names("held-out")[0])
    assert task.split("train").images.shape == (96, 64, 64, 3)
    for split, count in {"train": 8, "val": 8, "test": 24}.items():
        assert (np.bincount(task.split(split).labels) == count).all()
    few = task.split("train").few_shot(5, seed=0)
    assert (np.bincount(few.labels) == 5).all()
    assert len(set(few.sources)) == 24


def test_rendering_repeats_and_follows_its_seed(tasks: dict[str, Task]) -> None:
    name = task_names("bank")[0]
    assert load_task(name, image_size=32, views=ONE).digest == tasks[name].digest
    assert load_task(name, image_size=32, seed=1, views=ONE).digest != tasks[name].digest


def test_the_pack_is_small_and_a_task_loads_quickly() -> None:
    def seconds() -> float:
        started = time.process_time()
        load_task("greek-1")
        return time.process_time() - started

    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 10_000_000
    assert min(seconds() for _ in range(2)) < 1.5


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TaskError, match="greek-1"):
        load_task("greek-9")
