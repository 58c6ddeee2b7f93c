"""Votes of other kinds keep their order and take the learnt votes' values; stacks give what the plain mean gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError
from kiridashi_server.compose.calibration import on_one_scale
from kiridashi_server.compose.composition import compose, robust_mean
from kiridashi_server.compose.stack import SUMMARY_ROWS, ScoreStack, flatten, split, summarise
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.evidence import weigh
from kiridashi_server.similarity.measure import find_measure
from tiny_science import make_record

SIZES = {"a": 4, "b": 6}


def _scores(generator, factor=1.0):
    return {name: (factor * generator.random(size)).astype(np.float32) for name, size in SIZES.items()}


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_a_vote_that_is_not_learnt_keeps_its_order_whatever_its_scale(seed, factor):
    generator = np.random.default_rng(seed)
    learnt, other = _scores(generator), _scores(generator, factor)
    same, moved = on_one_scale([learnt, other], [True, False])
    assert same is learnt
    for name in SIZES:
        assert np.sort(moved[name]) == pytest.approx(np.sort(learnt[name]))
        assert np.argsort(moved[name]).tolist() == np.argsort(other[name]).tolist()


def test_units_with_equal_scores_share_their_place():
    learnt = {"a": np.array([1, 2, 3, 10], np.float32)}
    cut = {"a": np.array([0, 5, 0, 4], np.float32)}
    assert on_one_scale([learnt, cut], [True, False])[1]["a"].tolist() == [1.5, 10.0, 1.5, 3.0]


def test_without_learnt_votes_own_scores_are_the_scale_and_without_those_every_group_has_mean_one():
    other = {"a": np.array([0, 5, 0, 3], np.float32)}
    own = {"a": np.array([7, 8, 9, 10], np.float32)}
    assert on_one_scale([other], [False], own)[0]["a"].tolist() == [7.5, 10.0, 7.5, 9.0]
    assert on_one_scale([other], [False])[0]["a"].tolist() == [0.0, 2.5, 0.0, 1.5]
    assert on_one_scale([{"a": np.zeros(3, np.float32)}], [False])[0]["a"].tolist() == [1.0, 1.0, 1.0]


def _stack(votes):
    matrix = np.zeros((len(votes) + SUMMARY_ROWS, sum(SIZES.values())), np.float32)
    for row, vote in enumerate(votes):
        matrix[row] = flatten(vote, SIZES, "x")
    summarise(matrix, SIZES)
    return ScoreStack(tuple(f"{row:03d}" for row in range(len(votes))), SIZES, matrix)


@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_a_stack_gives_the_robust_mean(seed, count, uniform):
    generator = np.random.default_rng(seed)
    votes = [_scores(generator, 100.0 if row == 0 else 1.0) for row in range(count)]
    weights = np.full(count, 1 / count) if uniform else generator.dirichlet(np.ones(count))
    stack = _stack(votes)
    found = stack.mean(dict(zip(stack.ids, weights, strict=True)))
    expected = robust_mean(votes, weights)
    for name in SIZES:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


def test_one_more_vote_cannot_turn_a_stack():
    generator = np.random.default_rng(0)
    stack = _stack([_scores(generator) for _ in range(9)])
    weights = dict.fromkeys(stack.ids, 0.1)
    wild = {name: np.full(size, 1e9, np.float32) for name, size in SIZES.items()}
    mixed = stack.mean(weights, (wild, 0.1))
    assert max(float(values.max()) for values in mixed.values()) < 5


def test_a_row_is_split_as_it_was_flattened_and_other_groups_are_refused():
    vote = _scores(np.random.default_rng(1))
    back = split(flatten(vote, SIZES, "x"), SIZES)
    assert {name: values.tolist() for name, values in back.items()} == {
        name: values.tolist() for name, values in vote.items()
    }
    with pytest.raises(InputError, match="cannot be combined"):
        flatten({"a": vote["a"]}, SIZES, "x")


@pytest.fixture
def target():
    labels = np.repeat(np.arange(3), 8)
    return Descriptor((4 * np.eye(3, 4)[labels]).astype(np.float32), labels)


def _weigh(records, target, measure="loo-leep"):
    return weigh(records, target, find_measure(measure), fingerprint="backbone", layout_digest="layout")


def _headless(name="old model", factor=1.0):
    scores = _scores(np.random.default_rng(5), factor)
    return make_record(name, scores=scores, headless=True, kind="tuned")


@pytest.mark.parametrize("measure", ["loo-leep", "frechet"])
def test_a_record_without_head_is_not_judged_but_votes_as_an_average_one(target, measure):
    records = [*(make_record(f"task {index}", head=2 * np.eye(3, 4)) for index in range(3)), _headless(factor=1e6)]
    evidence = _weigh(records, target, measure)
    assert [(task, reason.split()[-1]) for _, task, reason in evidence.silent] == [
        ("old model", "head" if measure == "loo-leep" else "moments")
    ]
    assert len(evidence.items) == 3
    mix = compose(evidence, records)
    assert mix.weights == pytest.approx({record.id: 0.25 for record in records})
    assert "1 that" in mix.explanation
    assert max(float(values.max()) for values in mix.scores.values()) <= 3  # its own scale would have been a million


def test_a_measure_that_needs_nothing_judges_all(target):
    evidence = _weigh([_headless()], target, "uniform")
    assert (len(evidence.items), evidence.silent) == (1, ())


def test_a_bank_of_checkpoints_only_is_blended_with_own_scores(target):
    records = [_headless("one"), _headless("two", 50.0)]
    evidence = _weigh(records, target)
    assert (evidence.verdict, "judge none" in evidence.reason) == ("blend", True)
    own = {"a": np.arange(4, dtype=np.float32), "b": np.arange(6, dtype=np.float32)}
    mix = compose(evidence, records, own=own)
    assert mix.weights["own"] == pytest.approx(1 / 3)
    assert float(mix.scores["b"].max()) <= 5


def test_compose_uses_a_stack_of_just_the_records_that_vote(target):
    records = [
        make_record(f"task {index}", head=2 * np.eye(3, 4), scores=_scores(np.random.default_rng(index)))
        for index in range(5)
    ]
    evidence = _weigh(records, target)
    marked = np.full((5 + SUMMARY_ROWS, 10), 42, np.float32)
    stack = ScoreStack(tuple(sorted(record.id for record in records)), SIZES, marked)
    assert compose(evidence, records, stack=stack).scores["a"].tolist() == pytest.approx([42.0] * 4)
    fewer = ScoreStack(stack.ids[1:], SIZES, marked[1:])
    assert compose(evidence, records, stack=fewer).scores["a"].max() < 1
