"""Tasks of a tiny bank play new: measured cell by cell, resumed, kept, forgotten, and used by the comparison."""

import dataclasses

import numpy as np
import pytest
from assessed import make_assessment
from kiridashi.errors import InputError
from kiridashi_server.amp.learning import ScoreSettings
from kiridashi_server.bank.assessments import AssessmentStore
from kiridashi_server.bank.errors import BankDamagedError
from kiridashi_server.bank.learning import learn_record
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.cut import masked
from kiridashi_server.pipeline import compose_scores
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.similarity import assess as assessing
from kiridashi_server.similarity.assess import assess, blank
from kiridashi_server.similarity.assessment import STATISTICS, AssessSettings
from kiridashi_server.similarity.choice import choose_measure
from kiridashi_server.similarity.comparison import compare
from kiridashi_server.similarity.masks import MaskedBackbone, describe
from kiridashi_server.similarity.measure import MEASURES
from tiny_science import tiny_backbone, tiny_samples, tiny_task

SETTINGS = AssessSettings(share=0.5, per_class=4, iterations=2)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture(scope="module")
def tasks():
    return [tiny_task(f"hues {number}", seed=10 * number) for number in range(4)]


@pytest.fixture(scope="module")
def records(backbone, tasks):
    return [learn_record(backbone, task, ScoreSettings(iterations=2)) for task in tasks]


@pytest.fixture(scope="module")
def assessment(backbone, tasks, records):
    return assess(backbone, tasks[0], records, SETTINGS, keep=lambda _: None)


def test_features_under_a_mask_are_those_of_the_masked_model(backbone, records):
    samples = tiny_samples(3, 5)
    plan = select(records[0].scores, backbone.layout, backbone.costs, 0.5)
    expected = run_batched(masked(backbone.program, backbone.tracking, plan), to_input(backbone, samples.images))
    found = MaskedBackbone(backbone, samples.images, 0.5).features(records[0].scores)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert not np.allclose(found, run_batched(backbone.program, to_input(backbone, samples.images)).numpy(), atol=1e-3)


def test_a_descriptor_has_what_was_asked_for_and_no_more(backbone, records):
    samples = tiny_samples(3, 5)
    plain = describe(backbone, samples, 3, records)
    assert (plain.masked, plain.taylor) == ({}, {})
    full = describe(backbone, samples, 3, records, needs=("masked", "taylor"))
    assert full.masked.keys() == {record.id for record in records}
    assert {name: len(values) for name, values in full.taylor.items()} == dict(backbone.layout.sizes)


def test_a_task_is_assessed_by_all_others_and_never_by_its_own_record(assessment, records):
    others = {record.id for record in records[1:]}
    assert assessment.records == (records[0].id,)
    assert assessment.utilities.keys() == set(assessment.compared) == others
    assert all(values.keys() == others for values in assessment.similarities.values())
    assert assessment.composed.keys() == MEASURES.keys()
    assert assessment.statistics.keys() == set(STATISTICS)
    assert assessment.is_complete
    accuracies = (assessment.own, *assessment.utilities.values(), *assessment.composed.values())
    assert all(0.3 < value <= 1 for value in accuracies)


def test_assessing_goes_on_where_it_stopped_and_gives_the_same(
    backbone, tasks, records, assessment, tmp_path, monkeypatch
):
    store = AssessmentStore(tmp_path)

    def stop(found):
        store.put(found)
        if len(found.utilities) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assess(backbone, tasks[0], records, SETTINGS, keep=stop)
    known = store.like(blank(backbone, tasks[0], SETTINGS))
    assert (known.own, len(known.utilities), known.is_complete) == (assessment.own, 2, False)
    monkeypatch.setattr(assessing, "learn_scores", lambda *_, **__: pytest.fail("own scores were learnt again"))
    assert assess(backbone, tasks[0], records, SETTINGS, known=known, keep=store.put) == assessment
    assert store.list() == (assessment,)
    done = assess(backbone, tasks[0], records, SETTINGS, known=assessment, keep=lambda _: pytest.fail("measured again"))
    assert done == assessment


def test_a_grown_bank_measures_what_it_changes_and_keeps_the_rest(backbone, tasks, records, assessment, monkeypatch):
    before = assess(backbone, tasks[0], records[:3], SETTINGS, keep=lambda _: None)
    monkeypatch.setattr(assessing, "learn_scores", lambda *_, **__: pytest.fail("own scores were learnt again"))
    assert assess(backbone, tasks[0], records, SETTINGS, known=before, keep=lambda _: None) == assessment


def test_records_that_lack_what_a_measure_needs_have_no_similarity_by_it(backbone, tasks, records):
    bare = [dataclasses.replace(record, taylor={}) for record in records]
    found = assess(backbone, tasks[0], bare, SETTINGS, keep=lambda _: None)
    assert MEASURES.keys() - found.composed.keys() == {"score-ranks"}
    half = assess(backbone, tasks[0], [*records[:2], *bare[2:]], SETTINGS, keep=lambda _: None)
    assert half.similarities["score-ranks"].keys() == {records[1].id}
    assert half.composed["score-ranks"] == half.composed["uniform"]  # one alone cannot be tilted against
    assert found.is_complete


def test_a_lone_record_is_not_enough(backbone, tasks, records):
    with pytest.raises(InputError, match="1 records of other tasks"):
        assess(backbone, tasks[0], records[:2], SETTINGS, keep=lambda _: None)


def test_forgetting_a_record_takes_its_assessment_and_its_part_in_others(tmp_path):
    store = AssessmentStore(tmp_path)
    for name in ("one", "two"):
        store.put(make_assessment(name))
    store.forget("record of one")
    assert [found.task for found in store.list()] == ["two"]
    store.forget("a")
    assert [found.utilities.keys() for found in store.list()] == [{"b", "c"}]


def test_a_damaged_assessment_is_named(tmp_path):
    store = AssessmentStore(tmp_path)
    store.put(make_assessment())
    path = next((tmp_path / "assessments").iterdir())
    path.write_bytes(b"{")
    with pytest.raises(BankDamagedError, match=path.name) as caught:
        store.list()
    assert "bank assess" in caught.value.next_step


def _assessed(assessment, gains, **composed):
    return [
        assessment.changed(
            task=f"past {number}",
            task_digest=f"sha256:{number}",
            own=0.5,
            composed={"uniform": 0.5 + gain, **{name: 0.5 + gain + extra for name, extra in composed.items()}},
        )
        for number, gain in enumerate(gains)
    ]


def test_too_few_assessed_tasks_leave_the_uniform_bank_and_say_so(backbone, records, assessment):
    evidence = compare(backbone, records, tiny_samples(4, 99), assessments=_assessed(assessment, [0.1] * 8))
    assert evidence.verdict == compare(backbone, records, tiny_samples(4, 99)).verdict
    assert "8 of the bank's tasks are assessed, a calibrated verdict needs 9" in evidence.reason
    assert [item.weight for item in evidence.items] == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(("gain", "name"), [(0.1, "reuse"), (-0.1, "fallback")])
def test_enough_assessed_tasks_decide(backbone, records, assessment, gain, name):
    past = _assessed(assessment, np.linspace(gain - 0.02, gain + 0.02, 9))
    evidence, composition = compose_scores(backbone, records, tiny_samples(4, 99), 3, 0, assessments=past)
    assert (evidence.verdict, composition.verdict) == (name, name)
    assert "9 tasks that played new" in evidence.reason
    assert evidence.reason in composition.explanation


def test_a_measure_that_has_earned_it_tilts_the_weights_and_another_may_be_shown(backbone, records, assessment):
    past = _assessed(assessment, np.linspace(0.08, 0.12, 9), knn=0.05)
    assert choose_measure(past).measure == "knn"
    samples = tiny_samples(4, 99)
    evidence = compare(backbone, records, samples, assessments=past)
    assert evidence.measure == "knn"
    assert "records weigh by similarity: knn" in evidence.reason
    shown = compare(backbone, records, samples, assessments=past, measure="mmd")
    assert shown.measure == "mmd"
    assert [item.weight for item in shown.items] == pytest.approx([0.25] * 4)


def test_a_record_that_the_chosen_measure_cannot_judge_votes_as_an_average_one(backbone, records, assessment):
    past = _assessed(assessment, np.linspace(0.08, 0.12, 9), **{"score-ranks": 0.05})
    mixed = [dataclasses.replace(records[0], taylor={}), *records[1:]]
    evidence, composition = compose_scores(backbone, mixed, tiny_samples(4, 99), 3, 0, assessments=past)
    assert (evidence.measure, evidence.verdict) == ("score-ranks", "reuse")
    assert [(task, why) for _, task, why in evidence.silent] == [("hues 0", "it has no first-order scores to compare")]
    assert composition.weights[mixed[0].id] == pytest.approx(0.25)
    assert sum(composition.weights.values()) == pytest.approx(1)


def test_an_empty_bank_is_a_fallback_however_much_is_assessed(backbone, assessment):
    evidence = compare(backbone, (), tiny_samples(4, 99), assessments=_assessed(assessment, [0.1] * 9))
    assert (evidence.verdict, evidence.items) == ("fallback", ())
