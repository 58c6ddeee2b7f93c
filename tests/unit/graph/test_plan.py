"""Plans: data that is complete, comparable and checked against its layout."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import ExitCode
from kiridashi_server.graph import Group, Layout, Member, Plan, PlanError

LAYOUT = Layout(
    (
        Group("a", 4, "filter", (Member("a.weight", 0),)),
        Group("b", 3, "node", (Member("b.weight", 0),)),
    ),
    (),
)


def test_full_keeps_everything() -> None:
    assert Plan.full(LAYOUT).kept == {"a": (0, 1, 2, 3), "b": (0, 1, 2)}
    assert Plan.full(LAYOUT).counts == {"a": 4, "b": 3}


def test_of_sorts_and_fills_in_what_is_not_named() -> None:
    assert Plan.of(LAYOUT, {"a": [3, 1]}).kept == {"a": (1, 3), "b": (0, 1, 2)}


@given(st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 2), min_size=1))
def test_json_both_ways(a: set[int], b: set[int]) -> None:
    plan = Plan.of(LAYOUT, {"b": b, "a": a})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    again.validate(LAYOUT)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"a": (0,)}, "says nothing about these groups: b"),
        ({"a": (0,), "b": (0,), "c": (0,)}, "unknown groups: c"),
        ({"a": (), "b": (0,)}, "leaves no unit of group 'a'"),
        ({"a": (0, 4), "b": (0,)}, "not ascending indices below 4"),
        ({"a": (-1, 2), "b": (0,)}, "not ascending"),
        ({"a": (1, 1), "b": (0,)}, "not ascending"),
        ({"a": (2, 1), "b": (0,)}, "not ascending"),
    ],
)
def test_what_does_not_fit_is_refused(kept: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        Plan(LAYOUT.digest, kept).validate(LAYOUT)
    assert caught.value.exit_code is ExitCode.MODEL
    assert caught.value.next_step


def test_a_plan_for_another_layout_is_refused() -> None:
    other = Layout(LAYOUT.groups[:1], ())
    with pytest.raises(PlanError, match="made for another layout"):
        Plan.full(LAYOUT).validate(other)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"layout_digest": "x", "kept": {"a": "b"}})])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="no plan"):
        Plan.from_json(text)


def test_it_prints_counts() -> None:
    assert str(Plan.of(LAYOUT, {"a": [0]})) == "a: 1 units\nb: 3 units"
