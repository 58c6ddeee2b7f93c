"""Composition: the mean of what records say, which no single record can turn."""

import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi_server.compose.composition import compose, robust_mean
from kiridashi_server.similarity.evidence import Evidence, EvidenceItem
from tiny_science import make_record


def _votes(count, seed=0):
    generator = np.random.default_rng(seed)
    truth = np.linspace(0, 1, 60)
    return [{"a": (truth + generator.normal(0, 0.1, 60)).astype(np.float32)} for _ in range(count)]


def _uniform(count):
    return np.full(count, 1 / count)


def test_without_outliers_it_is_the_weighted_mean():
    votes = [{"a": np.array([1.0, 5.0], np.float32)}, {"a": np.array([3.0, 1.0], np.float32)}]
    assert robust_mean(votes, np.array([0.75, 0.25]))["a"].tolist() == [1.5, 4.0]


@pytest.mark.parametrize("poison", [1e6, -1e6])
def test_one_poisoned_record_moves_no_unit_far(poison):
    votes = _votes(8)
    clean = robust_mean(votes, _uniform(8))["a"]
    generator = np.random.default_rng(1)
    turned = [*votes[:-1], {"a": (poison * generator.random(60)).astype(np.float32)}]
    poisoned = robust_mean(turned, _uniform(8))["a"]
    best = set(np.argsort(-clean)[:20])
    assert len(best & set(np.argsort(-poisoned)[:20])) >= 17
    assert np.abs(poisoned - clean).max() < 0.2


def test_units_on_which_most_agree_do_not_silence_the_rest():
    votes = [{"a": np.array([1.0, index], np.float32)} for index in range(5)]
    votes[0]["a"][0] = 2.0
    assert robust_mean(votes, _uniform(5))["a"][0] > 1.0


def test_votes_that_do_not_match_are_refused():
    with pytest.raises(InputError, match="cannot be combined"):
        robust_mean([{"a": np.ones(2, np.float32)}, {"a": np.ones(3, np.float32)}], _uniform(2))
    with pytest.raises(InputError, match="cannot be combined"):
        robust_mean([], np.zeros(0))


def _evidence(verdict, records, weights):
    items = tuple(
        EvidenceItem(record.id, record.task, 0.0, weight, "") for record, weight in zip(records, weights, strict=True)
    )
    return Evidence(items, verdict, "the reason", "uniform", None)


@pytest.fixture
def records():
    return [make_record(f"task {i}", scores={"a": np.full(3, i, np.float32)}) for i in range(3)]


def test_reuse_is_the_records_mean_with_its_story(records):
    composition = compose(_evidence("reuse", records, [0.5, 0.25, 0.25]), records, own={"a": np.full(3, 9, np.float32)})
    assert composition.scores["a"].tolist() == [0.75] * 3
    assert sum(composition.weights.values()) == pytest.approx(1)
    assert composition.explanation.startswith("reuse: the reason")
    assert "'task 0' weighs most (50%)" in composition.explanation


def test_a_blend_gives_own_scores_one_vote(records):
    evidence = _evidence("blend", records, _uniform(3))
    composition = compose(evidence, records, own={"a": np.full(3, 9, np.float32)})
    assert composition.weights["own"] == pytest.approx(0.25)
    assert "one more vote" in composition.explanation
    assert "own" not in compose(evidence, records).weights


def test_a_fallback_needs_own_scores():
    evidence = _evidence("fallback", [], [])
    own = {"a": np.ones(3, np.float32)}
    assert compose(evidence, [], own=own).scores is own
    with pytest.raises(InputError, match="no scores for this task") as caught:
        compose(evidence, [])
    assert "bank learn" in caught.value.next_step


def test_a_record_that_was_not_passed_is_named(records):
    with pytest.raises(InputError, match="'task 2'"):
        compose(_evidence("reuse", records, _uniform(3)), records[:2])
