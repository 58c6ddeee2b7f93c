"""What a task guarantees, and how few-shot samples are chosen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi_server.tasks import Samples, Task, TaskError


def samples(labels: list[int], sources: list[str], value: int = 0, size: int = 4) -> Samples:
    images = np.full((len(labels), size, size, 3), value, dtype=np.uint8)
    return Samples(images, np.asarray(labels, dtype=np.int64), tuple(sources))


def test_splits_come_in_the_fixed_order() -> None:
    task = Task("t", ("a", "b"), {"test": samples([0], ["x"]), "train": samples([0, 1], ["y", "z"])})
    assert list(task.splits) == ["train", "test"]


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        (("a",), {"train": samples([0], ["x"])}, "one class only"),
        ((), {}, "no class"),
        (("a", "a"), {"train": samples([0, 1], ["x", "y"])}, "same name"),
        (("a", "b"), {"train": samples([0, 0], ["x", "y"])}, "class 'b' is empty in split 'train'"),
        (("a", "b"), {"test": samples([0, 0], ["x", "y"])}, "class 'b' is empty in task"),
        (("a", "b"), {"train": samples([0, 2], ["x", "y"])}, "label number"),
        (("a", "b"), {"spare": samples([0, 1], ["x", "y"])}, "unknown split 'spare'"),
        (
            ("a", "b"),
            {"train": samples([0, 1], ["x", "y"]), "test": samples([0], ["y"])},
            "'y' is in two splits of task 't': train and test",
        ),
        (
            ("a", "b"),
            {"train": samples([0, 1], ["x", "y"]), "test": samples([0], ["z"], size=5)},
            "different sizes",
        ),
    ],
)
def test_unsound_tasks_are_refused(labels: tuple[str, ...], splits: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Task("t", labels, splits)


def test_samples_check_shapes_and_types() -> None:
    good = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(TaskError, match="uint8"):
        Samples(good.astype(np.float32), np.zeros(2, dtype=np.int64), ("a", "b"))
    with pytest.raises(TaskError, match="labels"):
        Samples(good, np.zeros(3, dtype=np.int64), ("a", "b"))
    with pytest.raises(TaskError, match="sources"):
        Samples(good, np.zeros(2, dtype=np.int64), ("a",))


def test_a_missing_split_is_named() -> None:
    task = Task("t", ("a", "b"), {"train": samples([0, 1], ["x", "y"])})
    with pytest.raises(TaskError, match="no split 'tune'") as caught:
        task.split("tune")
    assert "tune.txt" in caught.value.next_step


def test_digest_sees_every_part() -> None:
    def digest(name: str = "t", labels: tuple[str, ...] = ("a", "b"), value: int = 0, source: str = "y") -> str:
        return Task(name, labels, {"train": samples([0, 1], ["x", source], value)}).digest

    variants = {digest(), digest(name="u"), digest(labels=("a", "c")), digest(value=1), digest(source="z")}
    assert len(variants) == 5
    assert digest() == digest()


def test_clusters_are_equal_where_sources_are() -> None:
    clusters = samples([0, 0, 1, 1], ["p", "q", "p", "r"]).clusters
    assert clusters[0] == clusters[2]
    assert len(set(clusters.tolist())) == 3


@given(
    views=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    per_class=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_few_shot_is_balanced_and_spread(views: list[int], per_class: int, seed: int) -> None:
    """A source is used again only when no other source of the class has fewer samples and some left."""
    labels, sources = [], []
    for label in (0, 1):
        for number, count in enumerate(views):
            labels += [label] * count
            sources += [f"{label}-{number}"] * count
    whole = samples(labels, sources)
    if per_class > sum(views):
        with pytest.raises(TaskError, match="it has only"):
            whole.few_shot(per_class, seed)
        return
    few = whole.few_shot(per_class, seed)
    assert np.bincount(few.labels).tolist() == [per_class, per_class]
    for label in (0, 1):
        used = [few.sources.count(f"{label}-{number}") for number in range(len(views))]
        for a, count in zip(used, views, strict=True):
            assert a == count or a >= max(used) - 1


def test_few_shot_depends_on_the_seed_alone() -> None:
    whole = samples([0] * 20 + [1] * 20, [str(i) for i in range(40)])
    assert whole.few_shot(5, 1).sources == whole.few_shot(5, 1).sources
    assert whole.few_shot(5, 1).sources != whole.few_shot(5, 2).sources
    with pytest.raises(TaskError, match="at least one"):
        whole.few_shot(0, 1)
