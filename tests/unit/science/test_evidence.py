"""Weights, verdicts and reasons."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError
from kiridashi_server.similarity.descriptor import Descriptor
from kiridashi_server.similarity.evidence import EvidenceSettings, tilted_weights, weigh
from kiridashi_server.similarity.measure import find_measure
from tiny_science import make_record


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0, 4), st.floats(0.05, 1))
def test_weights_are_a_distribution_within_the_limit_and_follow_similarity(similarities, tilt, limit):
    weights = tilted_weights(np.array(similarities), tilt, limit)
    assert weights.sum() == pytest.approx(1)
    assert weights.max() <= max(limit, 1 / len(weights)) + 1e-9
    order = np.argsort(similarities, kind="stable")
    assert (np.diff(weights[order]) >= -1e-9).all()


def test_no_tilt_is_the_uniform_bank_and_tilt_favours_the_similar():
    similarities = np.array([-2.0, -1.0, 0.0])
    assert tilted_weights(similarities, 0, 0.4) == pytest.approx([1 / 3] * 3)
    assert tilted_weights(similarities, 1, 1.0)[2] > 0.6
    assert len(tilted_weights(np.zeros(0), 1, 0.4)) == 0


@pytest.fixture
def target():
    labels = np.repeat(np.arange(3), 8)
    return Descriptor((4 * np.eye(3, 4)[labels]).astype(np.float32), labels)


def _weigh(records, target, measure="loo-leep"):
    return weigh(records, target, find_measure(measure), fingerprint="backbone", layout_digest="layout")


def _records(count, head):
    return [make_record(f"task {index}", head=head) for index in range(count)]


def test_reuse_when_records_foretell_the_task(target):
    evidence = _weigh([*_records(3, 2 * np.eye(3, 4)), make_record("silent", head=np.zeros((3, 4)))], target)
    assert evidence.verdict == "reuse"
    assert "3 of the bank's 4 records" in evidence.reason
    assert evidence.items[-1].task == "silent"
    assert "say nothing" in evidence.items[-1].reason
    assert sum(item.weight for item in evidence.items) == pytest.approx(1)


def test_blend_when_no_record_says_anything_or_there_are_too_few(target):
    silent = _weigh(_records(4, np.zeros((3, 4))), target)
    assert (silent.verdict, "none of the bank's" in silent.reason) == ("blend", True)
    few = _weigh(_records(2, 2 * np.eye(3, 4)), target)
    assert (few.verdict, "only 2 records" in few.reason) == ("blend", True)


def test_fallback_names_why_records_cannot_be_used(target):
    other = make_record("elsewhere", fingerprint="another")
    older = make_record("older", layout="older layout")
    evidence = _weigh([other, older], target)
    assert evidence.verdict == "fallback"
    assert "none of its 2 records" in evidence.reason
    assert dict(evidence.left_out).keys() == {"elsewhere", "older"}
    assert _weigh([], target).reason == "the bank cannot help: it has no record of this backbone"


def test_a_measure_without_zero_point_cannot_refuse_reuse(target):
    assert _weigh(_records(3, np.zeros((3, 4))), target, "uniform").verdict == "reuse"


@pytest.mark.parametrize("change", [{"tilt": -1}, {"influence_limit": 0}, {"reuse_from": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match="out of range"):
        EvidenceSettings(**change)
