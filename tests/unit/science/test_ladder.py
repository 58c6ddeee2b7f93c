"""Nested prefixes: what is kept shrinks rung by rung, in multiples, above the floors, the same every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import BudgetError, InputError
from kiridashi_server.compose.ladder import build_ladder

score_maps = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.integers(0, 5), min_size=1, max_size=40).map(lambda values: np.array(values, dtype=np.float32)),
    min_size=1,
)


@given(score_maps, st.integers(1, 8), st.floats(0, 1))
def test_kept_units_are_nested_multiples_above_the_floor(scores, multiple, floor):
    ladder = build_ladder(scores, dict.fromkeys(scores, multiple), floor=floor)
    wider = ladder.kept(0)
    assert {name: len(units) for name, units in wider.items()} == {name: len(v) for name, v in scores.items()}
    for steps in range(1, len(ladder) + 1):
        kept = ladder.kept(steps)
        for name, units in kept.items():
            assert set(units) <= set(wider[name])
            assert len(units) == len(scores[name]) or len(units) % multiple == 0
            assert len(units) >= floor * len(scores[name])
            assert len(units) >= 1
        assert sum(map(len, kept.values())) < sum(map(len, wider.values()))
        wider = kept


@given(score_maps, st.integers(1, 4))
def test_best_units_stay_longest(scores, multiple):
    ladder = build_ladder(scores, dict.fromkeys(scores, multiple), floor=0)
    for name, units in ladder.kept(len(ladder) // 2).items():
        dropped = np.setdiff1d(np.arange(len(scores[name])), units)
        if len(dropped):
            assert scores[name][units].min() >= scores[name][dropped].max()


def test_rungs_are_ordered_by_value_over_all_groups():
    scores = {"low": np.full(8, 1.0, np.float32), "high": np.full(8, 2.0, np.float32)}
    ladder = build_ladder(scores, {"low": 2, "high": 2}, floor=0)
    assert [rung.group for rung in ladder.rungs] == ["low"] * 3 + ["high"] * 3


def test_equal_scores_leave_by_name_and_later_units_first():
    scores = {name: np.zeros(4, dtype=np.float32) for name in ("b", "a")}
    ladder = build_ladder(scores, {"a": 1, "b": 1}, floor=0)
    assert [(rung.group, rung.width) for rung in ladder.rungs][:4] == [("a", 3), ("a", 2), ("a", 1), ("b", 3)]
    assert ladder.kept(1)["a"].tolist() == [0, 1, 2]


def test_first_within_takes_as_few_steps_as_possible():
    ladder = build_ladder({"a": np.arange(20, dtype=np.float32)}, {"a": 1}, floor=0)

    def cost(widths):
        return widths["a"] ** 2

    steps = ladder.first_within(cost, 90)
    assert cost(ladder.widths(steps)) <= 90 < cost(ladder.widths(steps - 1))
    assert ladder.first_within(cost, 400) == 0
    with pytest.raises(BudgetError, match="no cut costs at most 0") as caught:
        ladder.first_within(cost, 0)
    assert "1" in caught.value.next_step


@pytest.mark.parametrize(
    ("scores", "floor"),
    [({"a": np.array([1.0, np.nan], np.float32)}, 0), ({}, 0), ({"a": np.ones(2, np.float32)}, 1.5)],
)
def test_unusable_arguments_are_refused(scores, floor):
    with pytest.raises(InputError):
        build_ladder(scores, dict.fromkeys(scores, 1), floor=floor)
