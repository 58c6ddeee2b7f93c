"""Which assessments count together, and what is left of them when a record is forgotten."""

import numpy as np
import pytest
from assessed import make_assessment
from kiridashi.errors import InputError
from kiridashi_server.similarity.assessment import AssessSettings, gains, statistics_of, usable_assessments


def test_only_complete_ones_of_the_backbone_and_the_most_common_settings_count_in_order_of_digests():
    other = AssessSettings(share=0.15)
    given = [
        make_assessment("b"),
        make_assessment("a"),
        make_assessment("a"),
        make_assessment("c", settings=other),
        make_assessment("d", backbone_fingerprint="another"),
        make_assessment("e", own=None),
        make_assessment("f", composed={}, statistics={}),
    ]
    assert [a.task for a in usable_assessments(given, "backbone", "layout")] == ["a", "b"]
    assert usable_assessments(given, "backbone", "older") == ()


def test_gains_are_the_banks_accuracy_less_the_own():
    given = [make_assessment("a", gain=0.1), make_assessment("b", gain=-0.2)]
    assert gains(given) == pytest.approx([0.1, -0.2])
    assert statistics_of(given).shape == (2, 3)
    assert statistics_of([]).shape == (0, 3)
    with pytest.raises(InputError, match="'c' is not fully assessed"):
        gains([make_assessment("c", own=None)])


def test_forgetting_takes_what_was_measured_with_the_record():
    assessment = make_assessment()
    assert assessment.without("record of hues") is None
    left = assessment.without("b")
    assert left.utilities.keys() == {"a", "c"}
    assert (left.own, left.is_complete) == (0.5, False)
    assert assessment.without("unknown") == assessment


@pytest.mark.parametrize("change", [{"share": 0.0}, {"share": 1.1}, {"per_class": 1}, {"tilt": 0}, {"iterations": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(InputError, match="out of range"):
        AssessSettings(**change)


def test_nothing_assessed_has_no_gains():
    assert np.array_equal(gains([]), np.zeros(0))
